// Runs an exported model over the points of a file, chunk by chunk, so that the file may be larger than memory.
//
// Usage: stream_queries MODEL.pt2 POINTS OUTPUT [POINTS PER CHUNK]
// POINTS is raw float32, (points, features); OUTPUT becomes raw float32, (points, fields). The model's metadata say how
// many features a point has (point_features); the model takes (1, n, features) for any n and returns (1, n, fields).
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

int64_t positive_integer(const std::string& name, const std::string& text) {
  size_t used = 0;
  int64_t number = 0;
  try {
    number = std::stoll(text, &used);
  } catch (const std::logic_error&) {
  }
  TORCH_CHECK(used == text.size() && number > 0, name, " must be a positive integer, got '", text, "'");
  return number;
}

int64_t point_features(torch::inductor::AOTIModelPackageLoader& model, const std::string& path) {
  const auto metadata = model.get_metadata();
  const auto entry = metadata.find("point_features");
  TORCH_CHECK(entry != metadata.end(), path, " has no point_features in its metadata");
  return positive_integer("point_features", entry->second);
}

void run(const std::string& model_path, const std::string& points_path, const std::string& output_path,
         int64_t chunk_size) {
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(model_path);
  const int64_t features = point_features(model, model_path);

  std::ifstream points_file(points_path, std::ios::binary);
  TORCH_CHECK(points_file.good(), "can't read ", points_path);
  const auto bytes = static_cast<int64_t>(std::filesystem::file_size(points_path));
  const int64_t bytes_per_point = features * static_cast<int64_t>(sizeof(float));
  TORCH_CHECK(bytes % bytes_per_point == 0, points_path, " has ", bytes, " bytes, which is no multiple of ",
              bytes_per_point, ": ", features, " float32 features a point");
  std::ofstream output_file(output_path, std::ios::binary);
  TORCH_CHECK(output_file.good(), "can't write ", output_path);

  const int64_t n_points = bytes / bytes_per_point;
  at::Tensor points = torch::empty({1, std::min(chunk_size, n_points), features});
  double model_seconds = 0;
  const auto begin = Clock::now();
  for (int64_t first = 0; first < n_points; first += chunk_size) {
    const int64_t n = std::min(chunk_size, n_points - first);
    points_file.read(static_cast<char*>(points.mutable_data_ptr()), n * bytes_per_point);
    TORCH_CHECK(points_file.gcount() == n * bytes_per_point, points_path, " ended at point ", first);
    const auto model_begin = Clock::now();
    const at::Tensor fields = model.run({points.narrow(1, 0, n)})[0].contiguous();
    model_seconds += seconds_since(model_begin);
    output_file.write(static_cast<const char*>(fields.const_data_ptr()), static_cast<std::streamsize>(fields.nbytes()));
    TORCH_CHECK(output_file.good(), "can't write ", output_path, " after point ", first);
  }
  const double seconds = seconds_since(begin);
  std::cout << n_points << " points in chunks of " << chunk_size << ": " << seconds << " s, of them " << model_seconds
            << " s in the model; " << static_cast<double>(n_points) / seconds << " points/s\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::cerr << "Usage: stream_queries MODEL.pt2 POINTS OUTPUT [POINTS PER CHUNK]\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], argc == 5 ? positive_integer("POINTS PER CHUNK", argv[4]) : 65536);
  } catch (const std::exception& error) {
    std::cerr << "stream_queries: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
