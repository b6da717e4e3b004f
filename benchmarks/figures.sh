#!/usr/bin/env bash
# The README's table: trains with the preset `fast`, evaluates, and prints one line a category.
#   benchmarks/figures.sh DATASETS OUT
# DATASETS holds mvtec/bottle, hazelnut_toy and magnetic_tile in MVTec's layout. About half an hour on two cores.
set -euo pipefail
datasets=$1 out=$2
intra train "$datasets/mvtec/bottle" --out "$out/bottle" --preset fast --steps 4200
intra train "$datasets/hazelnut_toy" --out "$out/hazelnut_toy" --preset fast --minutes 3
intra train "$datasets/magnetic_tile" --out "$out/magnetic_tile" --preset fast --minutes 3
intra evaluate "$out/bottle" "$datasets/mvtec/bottle" --out "$out/bottle/results"
intra evaluate "$out/hazelnut_toy" "$datasets/hazelnut_toy" --out "$out/hazelnut_toy/results"
intra evaluate "$out/magnetic_tile" "$datasets/magnetic_tile" --out "$out/magnetic_tile/results"
