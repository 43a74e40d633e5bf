// Collectives as exchanges of half-slots: a rank writes a piece of its data, all ranks have written, every rank reads.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "memory.h"
#include "nccl_communicator.h"

namespace fake {

static const char* const NAMES[] = {"AllReduce", "Reduce", "Broadcast", "AllGather", "ReduceScatter",
                                    "AlltoAll",  "Gather", "Scatter",   "CommSplit"};
static const char* const OPERATIONS[] = {"sum", "prod", "max", "min", "avg"};

static bool reduces(Kind kind) {
  return kind == Kind::all_reduce || kind == Kind::reduce || kind == Kind::reduce_scatter;
}
static bool rooted(Kind kind) {
  return kind == Kind::reduce || kind == Kind::broadcast || kind == Kind::gather || kind == Kind::scatter;
}

static std::string described(ncclComm& c, const Collective& o) {
  std::string text = std::string(NAMES[int(o.kind)]) + " #" + std::to_string(++c.calls) + ", " + type_name(o.type) +
                     "[" + std::to_string(o.elements) + "]";
  if (reduces(o.kind)) text += o.operation < 5 ? std::string(" ") + OPERATIONS[o.operation] : " sum of scaled terms";
  if (rooted(o.kind)) text += " root " + std::to_string(o.root);
  return text;
}

// One collective under way: the loops over pieces share these.
struct Run {
  ncclComm& c;
  const Collective& o;
  Call call;
  Reduction reduction;
  size_t width;

  Run(ncclComm& communicator, const Collective& collective)
      : c(communicator), o(collective), width(type_bytes(collective.type)) {
    // Operations made by the program have numbers of its own; their factors travel with the data.
    auto scaled = c.scaled_operations.find(int(o.operation));
    if (scaled != c.scaled_operations.end()) reduction = scaled->second;
    else reduction.operation = o.operation;
    call = {int(o.kind), int(o.type), reduction.scaled ? -1 : int(o.operation), o.root, o.elements};
    if (reduces(o.kind) && !can_reduce(o.type))
      nccl_fatal(c.name + ": " + described(c, o) + ": the type can be moved, not reduced");
  }

  // A slot starts with the rank's factor; the data follow.
  static constexpr size_t HEAD = 64;
  size_t capacity(size_t parts) const { return (c.segment->slot_bytes() - HEAD) / width / parts; }

  using Write = std::function<void(char*)>;
  using Read = std::function<void(const std::vector<const char*>&, const std::vector<double>&)>;
  void exchange(const Write& write, const Read& read) {
    c.segment->exchange(
        call,
        [&](char* slot) {
          memcpy(slot, &reduction.factor, sizeof(double));
          write(slot + HEAD);
        },
        [&](const std::vector<const char*>& slots) {
          std::vector<const char*> data;
          std::vector<double> factors;
          for (const char* slot : slots) {
            double factor;
            memcpy(&factor, slot, sizeof factor);
            factors.push_back(factor);
            data.push_back(slot + HEAD);
          }
          read(data, factors);
        });
  }

  // Calls `piece(start, number)` for all elements, as many at a time as fit `parts` times into a slot.
  void in_pieces(size_t parts, const std::function<void(size_t, size_t)>& piece) {
    for (size_t start = 0; start < o.elements; start += capacity(parts))
      piece(start, std::min(capacity(parts), o.elements - start));
  }

  static std::vector<const char*> shifted(const std::vector<const char*>& data, size_t bytes) {
    std::vector<const char*> moved;
    for (const char* from : data) moved.push_back(from + bytes);
    return moved;
  }

  void all_reduce() {
    in_pieces(1, [&](size_t start, size_t n) {
      char* to = o.to + start * width;
      const auto write = [&](char* slot) { memcpy(slot, o.from + start * width, n * width); };
      if (n * width <= 64 * KIB) {  // one exchange instead of two; every rank does the same sums
        exchange(write, [&](auto& data, auto& factors) { reduce(reduction, o.type, to, data, n, factors); });
        return;
      }
      // Each rank reduces its share, then the shares are gathered.
      const size_t share = (n + c.ranks - 1) / c.ranks;
      const auto begin = [&](int r) { return std::min(n, r * share); };
      const auto number = [&](int r) { return std::min(n, (r + 1) * share) - begin(r); };
      std::vector<char> mine(share * width);
      exchange(write, [&](auto& data, auto& factors) {
        reduce(reduction, o.type, mine.data(), shifted(data, begin(c.rank) * width), number(c.rank), factors);
      });
      exchange([&](char* slot) { memcpy(slot, mine.data(), number(c.rank) * width); },
               [&](auto& data, auto&) {
                 for (int r = 0; r < c.ranks; r++) memcpy(to + begin(r) * width, data[r], number(r) * width);
               });
    });
  }

  void reduce_to_root() {
    in_pieces(1, [&](size_t start, size_t n) {
      exchange([&](char* slot) { memcpy(slot, o.from + start * width, n * width); },
               [&](auto& data, auto& factors) {
                 if (c.rank == o.root) reduce(reduction, o.type, o.to + start * width, data, n, factors);
               });
    });
  }

  void broadcast() {
    in_pieces(1, [&](size_t start, size_t n) {
      exchange(
          [&](char* slot) {
            if (c.rank == o.root) memcpy(slot, o.from + start * width, n * width);
          },
          [&](auto& data, auto&) {
            if (c.rank != o.root || o.to != o.from) memcpy(o.to + start * width, data[o.root], n * width);
          });
    });
  }

  // Every rank's part to all ranks, or to the root alone.
  void gather(bool to_all) {
    in_pieces(1, [&](size_t start, size_t n) {
      exchange([&](char* slot) { memcpy(slot, o.from + start * width, n * width); },
               [&](auto& data, auto&) {
                 if (!to_all && c.rank != o.root) return;
                 for (int r = 0; r < c.ranks; r++) memcpy(o.to + (r * o.elements + start) * width, data[r], n * width);
               });
    });
  }

  // A slot holds a piece of the part of every rank.
  void write_parts(char* slot, size_t start, size_t n) {
    for (int r = 0; r < c.ranks; r++)
      memcpy(slot + r * n * width, o.from + (r * o.elements + start) * width, n * width);
  }

  void reduce_scatter() {
    in_pieces(c.ranks, [&](size_t start, size_t n) {
      exchange([&](char* slot) { write_parts(slot, start, n); },
               [&](auto& data, auto& factors) {
                 reduce(reduction, o.type, o.to + start * width, shifted(data, c.rank * n * width), n, factors);
               });
    });
  }

  void all_to_all() {
    // Not in place in NCCL either: the parts that others sent would overwrite those not sent yet.
    in_pieces(c.ranks, [&](size_t start, size_t n) {
      exchange([&](char* slot) { write_parts(slot, start, n); },
               [&](auto& data, auto&) {
                 for (int r = 0; r < c.ranks; r++)
                   memcpy(o.to + (r * o.elements + start) * width, data[r] + c.rank * n * width, n * width);
               });
    });
  }

  void scatter() {
    in_pieces(c.ranks, [&](size_t start, size_t n) {
      exchange(
          [&](char* slot) {
            if (c.rank == o.root) write_parts(slot, start, n);
          },
          [&](auto& data, auto&) { memcpy(o.to + start * width, data[o.root] + c.rank * n * width, n * width); });
    });
  }
};

// Every other rank is taken to hold what this one holds. Sums are left as they are: a sum over 32 equal ranks helps
// nobody.
static void run_alone(ncclComm& c, const Collective& o) {
  const size_t bytes = o.elements * type_bytes(o.type);
  const auto move = [&](char* to, const char* from) {
    if (to != from && is_copied(bytes)) memmove(to, from, bytes);
  };
  switch (o.kind) {
    case Kind::all_gather:
    case Kind::gather:
      if (o.to)
        for (int r = 0; r < c.ranks; r++) move(o.to + r * bytes, o.from);
      break;
    case Kind::all_to_all:
      for (int r = 0; r < c.ranks; r++) move(o.to + r * bytes, o.from + r * bytes);
      break;
    case Kind::reduce_scatter: move(o.to, o.from + c.rank * bytes); break;
    case Kind::scatter:
      if (c.rank == o.root) move(o.to, o.from + c.rank * bytes);
      break;
    case Kind::reduce:
      if (c.rank == o.root) move(o.to, o.from);
      break;
    case Kind::broadcast:
      if (c.rank == o.root) move(o.to, o.from);
      break;
    default: move(o.to, o.from);
  }
}

void run_collective(ncclComm& c, const Collective& o) {
  if (!o.elements) return;
  if (!c.segment) return run_alone(c, o);
  Run run(c, o);
  c.segment->describe(described(c, o));
  switch (o.kind) {
    case Kind::all_reduce: run.all_reduce(); break;
    case Kind::reduce: run.reduce_to_root(); break;
    case Kind::broadcast: run.broadcast(); break;
    case Kind::all_gather: run.gather(true); break;
    case Kind::gather: run.gather(false); break;
    case Kind::reduce_scatter: run.reduce_scatter(); break;
    case Kind::all_to_all: run.all_to_all(); break;
    case Kind::scatter: run.scatter(); break;
    case Kind::split: break;  // nccl.cpp exchanges colours itself
  }
}

void send_all(ncclComm& c, const std::vector<Transfer>& sends) {
  if (!c.segment || sends.empty()) return;
  close_taken_files(c);
  std::map<int, std::vector<Transfer>> by_peer;
  for (const Transfer& t : sends) by_peer[t.peer].push_back(t);
  for (const auto& [peer, transfers] : by_peer) {
    const FilePlace place = Segment::create();
    uint64_t offset = 0;
    for (const Transfer& t : transfers) {
      for (size_t done = 0; done < t.bytes;) {
        const ssize_t n = pwrite(place.fd, t.address + done, t.bytes - done, off_t(offset + done));
        if (n <= 0) nccl_fatal(c.name + ": Send: " + strerror(errno));
        done += n;
      }
      offset += t.bytes;
    }
    offset = 0;
    for (const Transfer& t : transfers) {
      c.segment->describe("Send of " + std::to_string(t.bytes) + " bytes to rank " + std::to_string(peer));
      c.segment->post(peer, {place, offset, t.bytes});
      offset += t.bytes;
    }
    c.sent_files.push_back({peer, place.fd, c.segment->mailbox(c.rank, peer).sent});
  }
}

void close_taken_files(ncclComm& c) {
  const auto taken = [&](const SentFile& file) {
    if (int32_t(c.segment->mailbox(c.rank, file.peer).received - file.last) < 0) return false;
    close(file.fd);
    return true;
  };
  c.sent_files.erase(std::remove_if(c.sent_files.begin(), c.sent_files.end(), taken), c.sent_files.end());
}

void receive(ncclComm& c, const Transfer& t) {
  if (!c.segment) return;
  c.segment->describe("Recv of " + std::to_string(t.bytes) + " bytes from rank " + std::to_string(t.peer));
  const Message message = c.segment->next_message(t.peer);
  const std::string which = c.name + ": rank " + std::to_string(c.rank) + " receives " + std::to_string(t.bytes) +
                            " bytes from rank " + std::to_string(t.peer);
  if (message.bytes != t.bytes) nccl_fatal(which + ", which sent " + std::to_string(message.bytes));
  const std::string path = "/proc/" + std::to_string(message.place.pid) + "/fd/" + std::to_string(message.place.fd);
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) nccl_fatal(which + ", which has ended");
  for (size_t done = 0; done < t.bytes;) {
    const ssize_t n = pread(fd, t.address + done, t.bytes - done, off_t(message.offset + done));
    if (n <= 0) nccl_fatal(which + ": " + strerror(errno));
    done += n;
  }
  close(fd);
  c.segment->message_taken(t.peer);
}

}  // namespace fake
