#include "host/interrupts.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>

namespace anchor_attention {
namespace {

constexpr std::chrono::milliseconds kBetweenQuestions{100};

// The functions of Python that are needed, found if the process has them: the library does not link Python.
struct Python {
  int (*is_initialized)() = find<int()>("Py_IsInitialized");
  int (*gil_ensure)() = find<int()>("PyGILState_Ensure");
  void (*gil_release)(int) = find<void(int)>("PyGILState_Release");
  int (*check_signals)() = find<int()>("PyErr_CheckSignals");
  void (*fetch)(void**, void**, void**) = find<void(void**, void**, void**)>("PyErr_Fetch");
  void (*restore)(void*, void*, void*) = find<void(void*, void*, void*)>("PyErr_Restore");
  int (*add_pending_call)(int (*)(void*), void*) = find<int(int (*)(void*), void*)>("Py_AddPendingCall");

  bool is_there() const {
    return is_initialized && gil_ensure && gil_release && check_signals && fetch && restore && add_pending_call &&
           is_initialized() != 0;
  }

 private:
  template <typename Function>
  static Function* find(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  }
};

const Python& python() {
  static const Python functions;
  return functions;
}

// An exception on its way from a signal's handler to the interpreter.
struct Raised {
  void* type = nullptr;
  void* value = nullptr;
  void* traceback = nullptr;
};

// A pending call of the interpreter: it makes what fails here the exception of the code that runs next.
int raise(void* argument) {
  Raised* raised = static_cast<Raised*>(argument);
  python().restore(raised->type, raised->value, raised->traceback);
  delete raised;
  return -1;
}

// Python runs handlers on the main thread alone. Another one must not even ask: it would wait for the interpreter's
// lock, which the thread that waits for the call may hold, and which ends a thread of a process that is ending.
bool is_main_thread() { return syscall(SYS_gettid) == getpid(); }

// Runs the handlers of signals that have come; true if one of them raised.
bool handler_raised() {
  const Python& py = python();
  if (!py.is_there()) return false;
  const int gil = py.gil_ensure();
  const bool raised = py.check_signals() != 0;
  if (raised) {
    auto* exception = new Raised;
    py.fetch(&exception->type, &exception->value, &exception->traceback);
    // The queue has room for a few dozen calls; if it is full, only the exception of the operation is seen.
    if (py.add_pending_call(raise, exception) != 0) delete exception;
  }
  py.gil_release(gil);
  return raised;
}

}  // namespace

bool Interrupts::stops() {
  if (stopped_.load(std::memory_order_relaxed)) return true;
  if (std::this_thread::get_id() != caller_) return false;
  const Clock::time_point now = Clock::now();
  if (now - asked_ < kBetweenQuestions) return false;
  asked_ = now;
  if (is_main_thread() && handler_raised()) stopped_.store(true, std::memory_order_relaxed);
  return stopped_.load(std::memory_order_relaxed);
}

void Interrupts::throw_if_stopped() const {
  if (stopped_.load(std::memory_order_relaxed)) {
    throw std::runtime_error("anchor_attention: interrupted by the handler of a signal");
  }
}

}  // namespace anchor_attention
