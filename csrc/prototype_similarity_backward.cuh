// What the backward kernels of prototype_similarity share on a GPU: their problem, cut into chunks of an
// image.
#pragma once

#include "prototype_similarity_device.cuh"

namespace cisc::prototype_similarity {
namespace {

constexpr int kDeep = 256;  // channels whose values a block has in registers
// kBlocks: of a launch that leaves partial sums, where there is as much to do. kInversePixels: whose norms
// are held at once. Few in the simulator: its images and batches are large ones to it.
#ifdef CISC_SIMT
constexpr int64_t kPartialBytes = 24 << 10, kBlocks = 12, kInversePixels = 500;
#else
constexpr int64_t kPartialBytes = 16 << 20, kBlocks = 2048, kInversePixels = 4 << 20;
#endif

// What comes back: [B,S,h,w] float32 of some images, in place.
using Grad = Planes<const float>;

struct Back {
  Problem problem;
  Grad grad;
  int64_t most, most_chunks;  // images of a launch, and chunks of one that there is memory for
  int64_t chunks, steps;      // of an image; tiles of a chunk
  bool shared_sums;
  float* partial;  // [images,chunks,S,C], what a chunk's pixels send to the unit vectors
  float* inverse;  // [images,h*w], 1 / norm of the query's pixels, or null
  bool adds;       // to the partial sums of an image's earlier pixels
};

// Cuts images into chunks of so many tiles each. As many where a launch has fewer images: there would not be
// memory for the sums of more.
void cut(Back& b, int64_t beside = 1) {
  b.steps = ceil_div(b.problem.tiles, std::min(b.most_chunks, ceil_div(kBlocks, b.most * beside)));
  b.chunks = ceil_div(b.problem.tiles, b.steps);  // most_chunks at most
}

}  // namespace
}  // namespace cisc::prototype_similarity
