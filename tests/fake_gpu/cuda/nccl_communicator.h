// One rank of a communicator, and how its collectives are done over the shared segment.
#pragma once
#include <nccl.h>

#include <memory>
#include <string>

#include "nccl_reduce.h"
#include "nccl_segment.h"

namespace fake {

// A file of messages, kept open until the last of them was taken: its number among all that were sent to this peer.
struct SentFile {
  int peer, fd;
  uint32_t last;
};

}  // namespace fake

struct ncclComm {
  int ranks, rank, device;
  std::string name;
  // Null for a rank that plays alone (FAKE_NCCL=alone): a collective then takes every rank's data to be this rank's.
  std::unique_ptr<fake::Segment> segment;
  std::map<int, fake::Reduction> scaled_operations;
  std::vector<fake::SentFile> sent_files;
  long calls = 0;
};

namespace fake {

enum class Kind { all_reduce, reduce, broadcast, all_gather, reduce_scatter, all_to_all, gather, scatter, split };

struct Collective {
  Kind kind;
  const char* from;
  char* to;
  size_t elements;  // as in NCCL: of one rank's part where parts are told apart
  ncclDataType_t type;
  ncclRedOp_t operation = ncclSum;
  int root = 0;
};

void run_collective(ncclComm& communicator, const Collective& collective);

// Point to point: all messages of a group to one rank travel in one file.
struct Transfer {
  int peer;
  char* address;
  size_t bytes;
};
void send_all(ncclComm& communicator, const std::vector<Transfer>& sends);
void receive(ncclComm& communicator, const Transfer& transfer);
void close_taken_files(ncclComm& communicator);

}  // namespace fake
