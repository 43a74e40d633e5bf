// What the ranks of one communicator share: memory, a bell to wait on, and the state of every rank.
//
// The memory is a memfd that one rank creates and the others open as /proc/PID/fd/N. It has no name, so nothing is left
// behind whatever kills the processes; pages come with their first use.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "fake.h"

namespace fake {

// Where a memfd of another process can be opened.
struct FilePlace {
  int pid, fd;
};

// A collective as its caller described it. All ranks must have called the same.
struct Call {
  int kind, type, operation, root;
  uint64_t elements;
  bool operator==(const Call& o) const {
    return kind == o.kind && type == o.type && operation == o.operation && root == o.root && elements == o.elements;
  }
};

struct Message {
  FilePlace place;
  uint64_t offset, bytes;
};

constexpr int MAILBOX = 4096;  // messages under way between two ranks, before a sender waits
struct Mailbox {
  std::atomic<uint32_t> sent, received;
  Message messages[MAILBOX];
};

struct RankState {
  std::atomic<int> pid, aborted;
  std::atomic<uint32_t> step;  // exchanges that this rank has entered
  Call calls[2];               // of the last two exchanges
  char doing[128];             // for messages only
};

class Segment {
 public:
  // Creates the memory of a communicator that does not exist yet; `attach` gives it its size.
  static FilePlace create();

  // Called by every rank: returns when all have. The creator's file descriptor is closed.
  Segment(FilePlace place, int ranks, int rank, const std::string& name);
  ~Segment();

  // Every rank writes into its own half-slot, then reads from all of them. Half-slots alternate: when a rank writes one
  // again, every rank has entered the exchange in between, and so has read it.
  size_t slot_bytes() const { return slot_bytes_; }
  void exchange(const Call& call, const std::function<void(char*)>& write,
                const std::function<void(const std::vector<const char*>&)>& read);

  // Point to point. A message is a memfd of the sender: posting never waits for the receiver, so no order of sends
  // deadlocks.
  Mailbox& mailbox(int from, int to) { return mailboxes_[size_t(from) * ranks_ + to]; }
  void post(int to, const Message& message);
  Message next_message(int from);
  void message_taken(int from);
  // Waits until every message of this rank was taken: their memory dies with this process.
  void flush();

  // What this rank does, for the message of whoever waits for it in vain.
  void describe(const std::string& doing);
  void abort();

 private:
  // Sleeps until `ready`; ends the process with a report when that takes longer than FAKE_NCCL_TIMEOUT seconds, or when
  // one of the ranks that `missing` names is dead.
  void wait(const std::function<bool()>& ready, const std::function<bool(int)>& missing);
  [[noreturn]] void give_up(const std::string& why, const std::function<bool(int)>& missing);
  [[noreturn]] void mismatch(int other);
  void ring();

  int ranks_, rank_;
  std::string name_;
  size_t bytes_, slot_bytes_;
  char* memory_;
  std::atomic<uint32_t>* bell_;
  std::atomic<int>* claimed_ranks_;
  RankState* states_;
  Mailbox* mailboxes_;
  char* slots_;
};

// An error of the fake NCCL that cannot be returned: printed, then the process ends, and with it the job.
[[noreturn]] void nccl_fatal(const std::string& text);

}  // namespace fake
