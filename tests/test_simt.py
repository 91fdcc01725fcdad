"""The simulator under the CUDA kernels' tests: what it must show, and that it is right where a kernel is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from programs import SIMT, compile_program, needs_gcc, run_program

pytestmark = needs_gcc

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "simt.h"

constexpr int kThreads = 96, kBlocks = 2;
constexpr unsigned kAll = 0xffffffffu;

using Row = float[kThreads];

// Each thread takes what its neighbour has left in shared memory.
__global__ void neighbour(float* to, bool with_barrier) {
  Row& row = simt::shared<Row, 0>();
  row[threadIdx.x] = static_cast<float>(threadIdx.x + 1);
  if (with_barrier) __syncthreads();
  to[blockIdx.x * kThreads + threadIdx.x] = row[(threadIdx.x + 1) % kThreads];
}

__global__ void fresh(float* to) {
  Row& row = simt::shared<Row, 1>();
  float* more = reinterpret_cast<float*>(simt::dynamic_shared());
  const int i = threadIdx.x, place = blockIdx.x * kThreads + i;
  to[place] = std::isnan(row[i]) && std::isnan(more[i]) ? 1.0f : 0.0f;
  row[i] = more[i] = 0.0f;
}

__global__ void at_different_barriers() {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void one_has_left() {
  if (threadIdx.x == 3) return;
  __shfl_sync(kAll, 1, 0);
}

__global__ void half_a_warp() { __ballot_sync(0xffffu, true); }

__global__ void exchanges(int* wrong) {
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  const double value = 0.5 * threadIdx.x;
  const auto want = [&](double got, int from) { *wrong += got != 0.5 * (first + from); };
  want(__shfl_sync(kAll, value, 7), 7);
  want(__shfl_sync(kAll, value, 31 - lane), 31 - lane);
  for (int bits = 1; bits < 32; bits *= 2) want(__shfl_xor_sync(kAll, value, bits), lane ^ bits);
  want(__shfl_up_sync(kAll, value, 3), lane < 3 ? lane : lane - 3);
  want(__shfl_down_sync(kAll, value, 5), lane > 26 ? lane : lane + 5);
  *wrong += __ballot_sync(kAll, lane % 3 == 0) != 0x49249249u;
  *wrong += __any_sync(kAll, lane == 9) != true || __any_sync(kAll, lane > 31) != false;
  *wrong += __all_sync(kAll, lane < 32) != true || __all_sync(kAll, lane != 9) != false;
  *wrong += __match_any_sync(kAll, lane % 3) != 0x49249249u << lane % 3;
  *wrong += __match_any_sync(kAll, value) != 1u << lane;
  *wrong += __match_any_sync(kAll, lane == 9 ? 1LL << 40 : 0LL) != (lane == 9 ? 1u << 9 : ~(1u << 9));
  int sum = lane;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
  *wrong += sum != 31 * 16;
}

__global__ void numbered(int* count, int* order) { order[(*count)++] = blockIdx.x * kThreads + threadIdx.x; }

int main(int, char** words) {
  const std::string what = words[1];
  std::vector<float> to(kBlocks * kThreads);
  const auto print = [&] {
    for (const float value : to) std::printf("%g ", value);
  };
  if (what == "barrier" || what == "no_barrier") {
    simt::launch(kBlocks, kThreads, 0, [&] { neighbour(to.data(), what == "barrier"); });
    print();
  } else if (what == "fresh") {
    simt::launch(kBlocks, kThreads, sizeof(Row), [&] { fresh(to.data()); });
    simt::launch(kBlocks, kThreads, sizeof(Row), [&] { fresh(to.data()); });
    print();
  } else if (what == "different") {
    simt::launch(1, 64, 0, [] { at_different_barriers(); });
  } else if (what == "left") {
    simt::launch(1, 32, 0, [] { one_has_left(); });
  } else if (what == "half") {
    simt::launch(1, 32, 0, [] { half_a_warp(); });
  } else if (what == "odd") {
    simt::launch(1, 48, 0, [] {});
  } else if (what == "large") {
    simt::launch(1, 32, simt::shared_limit() + 1, [] {});
  } else if (what == "exchanges") {
    int wrong = 0;
    simt::launch(kBlocks, kThreads, 0, [&] { exchanges(&wrong); });
    std::printf("%d", wrong);
  } else if (what == "order") {
    int count = 0;
    std::vector<int> order(kBlocks * kThreads);
    simt::launch(kBlocks, kThreads, 0, [&] { numbered(&count, order.data()); });
    for (const int value : order) std::printf("%d ", value);
  } else {
    std::printf("%d", static_cast<int>(simt::multiprocessors()));
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simt")
    main = folder / "main.cpp"
    main.write_text(PROGRAM)
    return compile_program(folder / "main", main, SIMT / "simt.cpp", flags=("-U_FORTIFY_SOURCE",))


def run(program: Path, what: str, order: str = "forward", **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    return run_program(program, what, env={**kept, "CISC_SIMT_ORDER": order, **env})


def printed(program: Path, what: str, order: str = "forward", **env: str) -> list[str]:
    done = run(program, what, order, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


ORDERS = ("forward", "reverse", "shuffle")


def test_a_missing_barrier_shows(program: Path) -> None:
    """Right with it in any order; without it nothing that the neighbour has left, or another thing."""
    right = [str((i + 1) % 96 + 1) for i in range(96)] * 2
    assert [printed(program, "barrier", order) for order in ORDERS] == [right] * 3
    without = [printed(program, "no_barrier", order) for order in ORDERS]
    assert all(found != right for found in without)
    assert without[0] != without[1] and "nan" in without[0][0].lower()


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_is_nan_at_first(program: Path, order: str) -> None:
    """Of each block, though the one before has left zeros; static and dynamic."""
    assert printed(program, "fresh", order) == ["1"] * 192


@pytest.mark.parametrize("order", ORDERS)
def test_exchanges_in_a_warp(program: Path, order: str) -> None:
    assert printed(program, "exchanges", order) == ["0"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("different", "threads wait at different barriers"),
        ("left", "have left a warp's exchange"),
        ("half", "whole warps only"),
        ("odd", "blocks are of whole warps"),
        ("large", "more shared memory than the chip has"),
    ],
)
def test_what_no_gpu_would_do_ends_the_process(program: Path, what: str, message: str) -> None:
    for order in ORDERS:
        done = run(program, what, order)
        assert done.returncode != 0
        assert done.stderr.startswith("simt: block ") and message in done.stderr


def test_orders(program: Path) -> None:
    forward, reverse, shuffled = (list(map(int, printed(program, "order", order))) for order in ORDERS)
    assert forward == list(range(192)) and reverse == forward[::-1]
    assert sorted(shuffled) == forward and shuffled not in (forward, reverse)


def test_number_of_multiprocessors(program: Path) -> None:
    assert printed(program, "multiprocessors") == ["3"]
    assert printed(program, "multiprocessors", CISC_SIMT_MULTIPROCESSORS="50") == ["50"]
