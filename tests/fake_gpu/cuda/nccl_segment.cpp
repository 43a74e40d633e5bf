#include "nccl_segment.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>

namespace fake {

void nccl_fatal(const std::string& text) {
  fprintf(stderr, "fake NCCL [pid %d]: %s\n", getpid(), text.c_str());
  fflush(stderr);
  ::abort();
}

FilePlace Segment::create() {
  const int fd = memfd_create("fake_nccl", MFD_CLOEXEC);
  if (fd < 0) nccl_fatal(std::string("memfd_create: ") + strerror(errno));
  return {getpid(), fd};
}

static size_t page_rounded(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

Segment::Segment(FilePlace place, int ranks, int rank, const std::string& name)
    : ranks_(ranks), rank_(rank), name_(name) {
  slot_bytes_ = size_t(setting("FAKE_NCCL_CHUNK_MIB", 4)) * MIB / 2;
  const size_t states = page_rounded(sizeof(RankState) * ranks), mail = page_rounded(sizeof(Mailbox) * ranks * ranks);
  bytes_ = 4096 + states + mail + 2 * slot_bytes_ * ranks;
  const bool mine = place.pid == getpid();
  const std::string path = "/proc/" + std::to_string(place.pid) + "/fd/" + std::to_string(place.fd);
  const int fd = mine ? place.fd : open(path.c_str(), O_RDWR | O_CLOEXEC);
  // All ranks give the same size; growing it twice changes nothing.
  if (fd < 0 || ftruncate(fd, off_t(bytes_)) != 0)
    nccl_fatal(name_ + ": rank " + std::to_string(rank) + " cannot open " + path + " (" + strerror(errno) +
               "): the rank that made the unique id has ended, or runs on another host");
  memory_ = (char*)mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (memory_ == MAP_FAILED) nccl_fatal(name_ + ": mmap: " + strerror(errno));
  bell_ = (std::atomic<uint32_t>*)memory_;
  claimed_ranks_ = (std::atomic<int>*)(memory_ + 64);
  states_ = (RankState*)(memory_ + 4096);
  mailboxes_ = (Mailbox*)(memory_ + 4096 + states);
  slots_ = memory_ + 4096 + states + mail;

  int nobody = 0;
  if (!claimed_ranks_->compare_exchange_strong(nobody, ranks) && nobody != ranks)
    nccl_fatal(name_ + ": rank " + std::to_string(rank) + " says " + std::to_string(ranks) +
               " ranks, another rank said " + std::to_string(nobody));
  int no_pid = 0;
  if (!states_[rank].pid.compare_exchange_strong(no_pid, getpid()))
    nccl_fatal(name_ + ": rank " + std::to_string(rank) + " is process " + std::to_string(no_pid) + " and process " +
               std::to_string(getpid()));
  describe("joining the communicator");
  ring();
  const auto absent = [&](int r) { return states_[r].pid == 0; };
  wait(
      [&] {
        for (int r = 0; r < ranks_; r++)
          if (absent(r)) return false;
        return true;
      },
      absent);
  close(fd);
}

Segment::~Segment() { munmap(memory_, bytes_); }

void Segment::ring() {
  bell_->fetch_add(1);
  syscall(SYS_futex, bell_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

static bool is_dead(int pid) {
  // A process that ended and was not waited for yet still takes signals: its state is Z.
  char path[64], line[512] = "";
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE* file = fopen(path, "r");
  if (!file) return true;
  const char* read = fgets(line, sizeof line, file);
  fclose(file);
  const char* bracket = read ? strrchr(line, ')') : nullptr;
  return bracket && bracket[1] && (bracket[2] == 'Z' || bracket[2] == 'X');
}

void Segment::wait(const std::function<bool()>& ready, const std::function<bool(int)>& missing) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const std::chrono::seconds limit(setting("FAKE_NCCL_TIMEOUT", 120));
  while (true) {
    const uint32_t rung = bell_->load();
    if (ready()) return;
    const timespec slice = {0, 500'000'000};
    const long woken = syscall(SYS_futex, bell_, FUTEX_WAIT, rung, &slice, nullptr, 0);
    if (woken == 0 || errno == EAGAIN || ready()) {
      if (Clock::now() - start < limit) continue;
      if (ready()) return;
    }
    for (int r = 0; r < ranks_; r++) {
      if (!missing(r)) continue;
      if (states_[r].aborted) give_up("rank " + std::to_string(r) + " has aborted the communicator", missing);
      if (states_[r].pid && is_dead(states_[r].pid) && !ready())
        give_up("rank " + std::to_string(r) + " has ended", missing);
    }
    if (Clock::now() - start >= limit)
      give_up("no answer for " + std::to_string(limit.count()) + " s (FAKE_NCCL_TIMEOUT)", missing);
  }
}

void Segment::give_up(const std::string& why, const std::function<bool(int)>& missing) {
  std::string text = name_ + " of " + std::to_string(ranks_) + " ranks: rank " + std::to_string(rank_) + " waits in " +
                     states_[rank_].doing + ": " + why + ". Missing:";
  for (int r = 0; r < ranks_; r++) {
    if (!missing(r)) continue;
    text += "\n  rank " + std::to_string(r);
    if (!states_[r].pid) text += ", which never joined";
    else
      text += " (pid " + std::to_string(states_[r].pid) + (is_dead(states_[r].pid) ? ", ended" : "") +
              "), whose last call was " + states_[r].doing;
  }
  nccl_fatal(text);
}

void Segment::mismatch(int other) {
  nccl_fatal(name_ + " of " + std::to_string(ranks_) + " ranks: the ranks called different collectives:\n  rank " +
             std::to_string(rank_) + ": " + states_[rank_].doing + "\n  rank " + std::to_string(other) + ": " +
             states_[other].doing);
}

void Segment::exchange(const Call& call, const std::function<void(char*)>& write,
                       const std::function<void(const std::vector<const char*>&)>& read) {
  const uint32_t step = states_[rank_].step + 1;
  char* half = slots_ + (step % 2) * slot_bytes_ * ranks_;
  write(half + rank_ * slot_bytes_);
  states_[rank_].calls[step % 2] = call;
  states_[rank_].step.store(step);
  ring();
  // Counters wrap after four billion exchanges: differences are signed.
  const auto behind = [&](int r) { return int32_t(states_[r].step.load() - step) < 0; };
  wait(
      [&] {
        for (int r = 0; r < ranks_; r++)
          if (behind(r)) return false;
        return true;
      },
      behind);
  std::vector<const char*> slots(ranks_);
  for (int r = 0; r < ranks_; r++) {
    if (!(states_[r].calls[step % 2] == call)) mismatch(r);
    slots[r] = half + r * slot_bytes_;
  }
  read(slots);
}

void Segment::post(int to, const Message& message) {
  Mailbox& box = mailbox(rank_, to);
  wait([&] { return box.sent - box.received < MAILBOX; }, [&](int r) { return r == to; });
  box.messages[box.sent % MAILBOX] = message;
  box.sent.fetch_add(1);
  ring();
}

Message Segment::next_message(int from) {
  Mailbox& box = mailbox(from, rank_);
  wait([&] { return box.sent != box.received; }, [&](int r) { return r == from; });
  return box.messages[box.received % MAILBOX];
}

void Segment::message_taken(int from) {
  mailbox(from, rank_).received.fetch_add(1);
  ring();
}

void Segment::flush() {
  const auto unread = [&](int r) { return mailbox(rank_, r).sent != mailbox(rank_, r).received; };
  wait(
      [&] {
        for (int r = 0; r < ranks_; r++)
          if (unread(r)) return false;
        return true;
      },
      unread);
}

void Segment::describe(const std::string& doing) {
  snprintf(states_[rank_].doing, sizeof states_[rank_].doing, "%s", doing.c_str());
}

void Segment::abort() {
  states_[rank_].aborted = 1;
  ring();
}

}  // namespace fake
