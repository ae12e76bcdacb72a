// The memory that CPU kernels work in. That of past calls is kept for the next: memory fresh from the system costs a
// page fault for every 4 KiB, together longer than the kernel that works there.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace eva02 {
namespace {

struct alignas(64) Block {
  size_t bytes;  // that follow this header
};
constexpr size_t kKeepFrom = size_t{64} << 10;  // malloc keeps smaller ones itself
constexpr unsigned kSlots = 32;
// Whoever exchanges a slot's block for nullptr owns it; there is no lock that a fork could leave closed.
std::atomic<Block*> slots[kSlots];
std::atomic<size_t> kept_bytes{0}, most_bytes{size_t{256} << 20};
std::atomic<unsigned> next_out{0};  // the slot to empty next when there is no room
std::atomic<bool> filled_with_nan{false};

Block* new_block(size_t bytes) {
  const size_t total = sizeof(Block) + bytes;
  void* p = nullptr;
#if defined(__linux__)
  // Large workspaces ask for huge pages: a first touch of 2 MiB is one page fault instead of 512, and a product that
  // streams a packed operand misses the TLB less.
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool huge = total >= kHugePage;
  if (posix_memalign(&p, huge ? kHugePage : alignof(Block), total) != 0) throw std::bad_alloc();
  if (huge) madvise(p, total, MADV_HUGEPAGE);  // advice: where it cannot be taken, small pages do
#else
  if (posix_memalign(&p, alignof(Block), total) != 0) throw std::bad_alloc();
#endif
  return new (p) Block{bytes};
}

Block* take(unsigned slot) {
  Block* const block = slots[slot].exchange(nullptr);
  if (block != nullptr) kept_bytes -= block->bytes;
  return block;
}

bool keep(unsigned slot, Block* block) {
  Block* empty = nullptr;
  if ((kept_bytes += block->bytes) <= most_bytes && slots[slot].compare_exchange_strong(empty, block)) return true;
  kept_bytes -= block->bytes;
  return false;
}

void make_room(size_t bytes) {
  for (unsigned i = 0; i < kSlots && kept_bytes + bytes > most_bytes; ++i) free(take(next_out++ % kSlots));
}

void keep_or_free(Block* block) {
  if (block->bytes < kKeepFrom || block->bytes > most_bytes) return free(block);
  make_room(block->bytes);
  for (unsigned slot = 0; slot < kSlots; ++slot)
    if (slots[slot] == nullptr && keep(slot, block)) return;
  const unsigned slot = next_out++ % kSlots;
  free(take(slot));
  if (!keep(slot, block)) free(block);
}

Block* find_or_make(size_t bytes) {
  for (unsigned slot = 0; bytes >= kKeepFrom && slot < kSlots; ++slot) {
    if (slots[slot] == nullptr) continue;
    Block* const block = take(slot);
    if (block == nullptr) continue;
    if (block->bytes >= bytes && block->bytes / 2 <= bytes) return block;
    if (!keep(slot, block)) keep_or_free(block);
  }
  return new_block(bytes);
}

}  // namespace

void* allocate_workspace(size_t bytes) {
  Block* const block = find_or_make(bytes);
  if (filled_with_nan) memset(block + 1, 0xff, bytes);
  return block + 1;
}

void free_workspace(void* p) {
  if (p != nullptr) keep_or_free(static_cast<Block*>(p) - 1);
}

size_t keep_workspaces(size_t most) {
  const size_t before = most_bytes.exchange(most);
  make_room(0);
  return before;
}

void release_workspaces() {
  for (unsigned slot = 0; slot < kSlots; ++slot) free(take(slot));
}

bool fill_workspaces_with_nan(bool fill) { return filled_with_nan.exchange(fill); }

}  // namespace eva02
