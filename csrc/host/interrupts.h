// Ctrl-C, and every other signal whose handler in Python raises, ends a long call between two pieces of its work.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

namespace anchor_attention {

// One for each call. Python's handlers run on the main thread alone, so that a call from another thread never stops,
// and never waits for Python. In a process without Python, nothing is ever asked.
class Interrupts {
 public:
  // Whether to stop, asked from every thread that works for the call. The main thread, if it made the call, asks Python
  // several times a second: it runs the handlers of the signals that have arrived in the meantime.
  bool stops();

  // Throws if the call was stopped. The handler's exception is raised by the interpreter as soon as it runs again.
  void throw_if_stopped() const;

 private:
  using Clock = std::chrono::steady_clock;

  std::atomic<bool> stopped_{false};
  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point asked_ = Clock::now();
};

}  // namespace anchor_attention
