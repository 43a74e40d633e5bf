// NCCL's entry points. Work is done when it is called, or when its group ends; the ranks are processes of one host.
//
// FAKE_NCCL=alone plays one rank of a communicator whose other ranks do not run: communicators are as large as they are
// said to be, and a collective takes every rank's data to be this rank's.
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "counters.h"
#include "nccl_communicator.h"
#include "streams.h"

using namespace fake;
using N = ncclResult_t;

static bool alone() {
  static const bool yes = getenv("FAKE_NCCL") && !strcmp(getenv("FAKE_NCCL"), "alone");
  return yes;
}

// ---- communicators

struct UniqueId {
  char magic[8];
  FilePlace place;
  uint64_t number;  // of this communicator, for messages
};
static_assert(sizeof(UniqueId) <= sizeof(ncclUniqueId));
static const char MAGIC[8] = {'f', 'a', 'k', 'e', 'N', 'C', 'C', 'L'};

static UniqueId new_id() {
  static std::atomic<uint64_t> next{1};
  UniqueId id{};
  memcpy(id.magic, MAGIC, sizeof MAGIC);
  id.place = Segment::create();
  id.number = uint64_t(getpid()) << 16 | next++;
  return id;
}

static ncclComm_t join(const UniqueId& id, int ranks, int rank) {
  auto* c = new ncclComm{};
  c->ranks = ranks;
  c->rank = rank;
  c->device = current_device();
  use_device(c->device);
  char name[64];
  snprintf(name, sizeof name, "communicator %llx", (unsigned long long)id.number);
  c->name = name;
  if (!alone()) c->segment = std::make_unique<Segment>(id.place, ranks, rank, c->name);
  return c;
}

EXPORT N ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
EXPORT N ncclGetUniqueId(ncclUniqueId* out) {
  UniqueId id{};
  if (!alone()) id = new_id();
  memset(out, 0, sizeof *out);
  memcpy(out, &id, sizeof id);
  return ncclSuccess;
}
static N join_by_id(ncclComm_t* c, int ranks, const ncclUniqueId& given, int rank) {
  UniqueId id;
  memcpy(&id, &given, sizeof id);
  if (rank < 0 || rank >= ranks || (!alone() && memcmp(id.magic, MAGIC, sizeof MAGIC))) return ncclInvalidArgument;
  *c = join(id, ranks, rank);
  return ncclSuccess;
}
EXPORT N ncclCommInitRank(ncclComm_t* c, int ranks, ncclUniqueId id, int rank) {
  return join_by_id(c, ranks, id, rank);
}
EXPORT N ncclCommInitRankConfig(ncclComm_t* c, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
  return join_by_id(c, ranks, id, rank);
}
EXPORT N ncclCommInitRankScalable(ncclComm_t* c, int ranks, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return join_by_id(c, ranks, ids[0], rank);
}

struct Split {
  int color, key, rank;
  UniqueId id;
};

static N split(ncclComm& parent, int color, int key, ncclComm_t* out) {
  // Two exchanges: who goes where, then the id that the first of each colour has made.
  Split mine{color, key, parent.rank, {}};
  std::vector<Split> all(parent.ranks);
  const Call call{int(Kind::split), 0, 0, 0, 0};
  const auto exchange = [&] {
    parent.segment->exchange(
        call, [&](char* slot) { memcpy(slot, &mine, sizeof mine); },
        [&](const std::vector<const char*>& slots) {
          for (int r = 0; r < parent.ranks; r++) memcpy(&all[r], slots[r], sizeof mine);
        });
  };
  parent.segment->describe("CommSplit #" + std::to_string(++parent.calls));
  exchange();
  std::vector<Split> members;
  for (const Split& s : all)
    if (s.color == color) members.push_back(s);
  std::sort(members.begin(), members.end(),
            [](const Split& a, const Split& b) { return a.key != b.key ? a.key < b.key : a.rank < b.rank; });
  const int leader = members[0].rank;
  if (color != NCCL_SPLIT_NOCOLOR && leader == parent.rank) mine.id = new_id();
  exchange();
  *out = nullptr;
  if (color == NCCL_SPLIT_NOCOLOR) return ncclSuccess;
  const auto me = std::find_if(members.begin(), members.end(), [&](const Split& s) { return s.rank == parent.rank; });
  *out = join(all[leader].id, int(members.size()), int(me - members.begin()));
  return ncclSuccess;
}

EXPORT N ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* c, ncclConfig_t*) {
  if (parent->segment) return split(*parent, color, key, c);
  // Alone, nobody knows how many ranks have this colour: whoever plays one rank of many says so before each group.
  *c = color == NCCL_SPLIT_NOCOLOR ? nullptr
                                   : join({}, int(setting("FAKE_SPLIT_RANKS", 1)), int(setting("FAKE_SPLIT_RANK", 0)));
  return ncclSuccess;
}
EXPORT N ncclCommCount(ncclComm_t c, int* n) {
  *n = c->ranks;
  return ncclSuccess;
}
EXPORT N ncclCommUserRank(ncclComm_t c, int* rank) {
  *rank = c->rank;
  return ncclSuccess;
}
EXPORT N ncclCommCuDevice(ncclComm_t c, int* device) {
  *device = c->device;
  return ncclSuccess;
}
// Errors end the process where they happen; there is none to be asked for later.
EXPORT N ncclCommGetAsyncError(ncclComm_t, N* error) {
  *error = ncclSuccess;
  return ncclSuccess;
}
EXPORT const char* ncclGetErrorString(N) { return "result of the fake NCCL"; }
EXPORT const char* ncclGetLastError(ncclComm_t) { return ""; }

static void flush(ncclComm& c) {
  if (!c.segment || c.sent_files.empty()) return;
  c.segment->describe("CommDestroy, with messages that were not received");
  c.segment->flush();
  close_taken_files(c);
}
EXPORT N ncclCommFinalize(ncclComm_t c) {
  flush(*c);
  return ncclSuccess;
}
EXPORT N ncclCommDestroy(ncclComm_t c) {
  flush(*c);
  delete c;
  return ncclSuccess;
}
EXPORT N ncclCommAbort(ncclComm_t c) {
  if (c->segment) c->segment->abort();
  for (const SentFile& file : c->sent_files) close(file.fd);
  delete c;
  return ncclSuccess;
}
EXPORT N ncclMemAlloc(void** p, size_t n) { return cudaMalloc(p, n) ? ncclUnhandledCudaError : ncclSuccess; }
EXPORT N ncclMemFree(void* p) { return cudaFree(p) ? ncclUnhandledCudaError : ncclSuccess; }
EXPORT N ncclCommRegister(ncclComm_t, void*, size_t, void** handle) {
  *handle = nullptr;
  return ncclSuccess;
}

EXPORT N ncclRedOpCreatePreMulSum(ncclRedOp_t* operation, void* scalar, ncclDataType_t type, ncclScalarResidence_t,
                                  ncclComm_t c) {
  if (!can_reduce(type)) return ncclInvalidArgument;
  int number = ncclNumOps;
  while (c->scaled_operations.count(number)) number++;
  c->scaled_operations[number] = {ncclSum, true, scalar_value(type, scalar)};  // device memory is read as any other
  *operation = ncclRedOp_t(number);
  return ncclSuccess;
}
EXPORT N ncclRedOpDestroy(ncclRedOp_t operation, ncclComm_t c) {
  return c->scaled_operations.erase(int(operation)) ? ncclSuccess : ncclInvalidArgument;
}

// ---- groups

struct Pending {
  enum { collective, send, receive } what;
  ncclComm_t c;
  Collective call;
  Transfer transfer;
};
static thread_local int group_depth = 0;
static thread_local std::vector<Pending> group;
static thread_local cudaStream_t group_stream;

// All sends first: they wait for nobody, so no order of sends and receives within a group can block.
static void run(const std::vector<Pending>& pending) {
  std::map<ncclComm_t, std::vector<Transfer>> sends;
  for (const Pending& p : pending)
    if (p.what == Pending::send) sends[p.c].push_back(p.transfer);
  for (const auto& [c, transfers] : sends) send_all(*c, transfers);
  for (const Pending& p : pending) {
    if (p.what == Pending::collective) run_collective(*p.c, p.call);
    if (p.what == Pending::receive) receive(*p.c, p.transfer);
  }
}

static N submit(const Pending& pending, cudaStream_t stream) {
  group.push_back(pending);
  group_stream = stream;
  if (group_depth == 0) {
    std::vector<Pending> work;
    work.swap(group);
    enqueue(stream, [work] { run(work); });
  }
  return ncclSuccess;
}

EXPORT N ncclGroupStart() {
  group_depth++;
  return ncclSuccess;
}
EXPORT N ncclGroupEnd() {
  if (group_depth == 0) return ncclInvalidUsage;
  if (--group_depth || group.empty()) return ncclSuccess;
  std::vector<Pending> work;
  work.swap(group);
  enqueue(group_stream, [work] { run(work); });
  return ncclSuccess;
}
EXPORT N ncclGroupSimulateEnd(ncclSimInfo_t*) { return ncclInvalidUsage; }

// ---- communication

static N collective(ncclComm_t c, Kind kind, const void* from, void* to, size_t n, ncclDataType_t type, int operation,
                    int root, cudaStream_t stream) {
  if (unsigned(type) >= ncclNumTypes || root < 0 || root >= c->ranks) return ncclInvalidArgument;
  if (operation < 0 || (operation >= ncclNumOps && !c->scaled_operations.count(operation))) return ncclInvalidArgument;
  count(Counter::collectives);
  count(Counter::collective_bytes, long(n * type_bytes(type)));
  return submit(
      {Pending::collective, c, {kind, (const char*)from, (char*)to, n, type, ncclRedOp_t(operation), root}, {}},
      stream);
}

EXPORT N ncclAllReduce(const void* from, void* to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                       cudaStream_t s) {
  return collective(c, Kind::all_reduce, from, to, n, t, op, 0, s);
}
EXPORT N ncclReduce(const void* from, void* to, size_t n, ncclDataType_t t, ncclRedOp_t op, int root, ncclComm_t c,
                    cudaStream_t s) {
  return collective(c, Kind::reduce, from, to, n, t, op, root, s);
}
EXPORT N ncclBroadcast(const void* from, void* to, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
  return collective(c, Kind::broadcast, from, to, n, t, ncclSum, root, s);
}
EXPORT N ncclBcast(void* buffer, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
  return collective(c, Kind::broadcast, buffer, buffer, n, t, ncclSum, root, s);
}
EXPORT N ncclAllGather(const void* from, void* to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
  return collective(c, Kind::all_gather, from, to, n, t, ncclSum, 0, s);
}
EXPORT N ncclReduceScatter(const void* from, void* to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t s) {
  return collective(c, Kind::reduce_scatter, from, to, n, t, op, 0, s);
}
EXPORT N ncclAlltoAll(const void* from, void* to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
  return collective(c, Kind::all_to_all, from, to, n, t, ncclSum, 0, s);
}
EXPORT N ncclGather(const void* from, void* to, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
  return collective(c, Kind::gather, from, to, n, t, ncclSum, root, s);
}
EXPORT N ncclScatter(const void* from, void* to, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
  return collective(c, Kind::scatter, from, to, n, t, ncclSum, root, s);
}

static N transfer(decltype(Pending::what) what, void* address, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                  cudaStream_t s) {
  if (unsigned(type) >= ncclNumTypes || peer < 0 || peer >= c->ranks) return ncclInvalidArgument;
  count(what == Pending::send ? Counter::sends : Counter::receives);
  return submit({what, c, {}, {peer, (char*)address, n * type_bytes(type)}}, s);
}
EXPORT N ncclSend(const void* from, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
  return transfer(Pending::send, const_cast<void*>(from), n, t, peer, c, s);
}
EXPORT N ncclRecv(void* to, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
  return transfer(Pending::receive, to, n, t, peer, c, s);
}

// ---- not played: an error, since success would be believed

EXPORT N ncclCommInitAll(ncclComm_t*, int, const int*) { return ncclInvalidUsage; }
EXPORT N ncclCommShrink(ncclComm_t, int*, int, ncclComm_t*, ncclConfig_t*, int) { return ncclInvalidUsage; }
EXPORT N ncclCommWindowRegister(ncclComm_t, void*, size_t, ncclWindow_t*, int) { return ncclInvalidUsage; }
