// Package bench holds how Outrigger is compared with what a user would pick instead. It
// has no code of its own:
//
//   - runner measures every row of the comparison and writes bench/results/latest.json;
//     make bench runs it, make bench BENCH=<regexp> a part of it.
//   - peers is a Go module of its own with the Go programs ours are compared with, so
//     that their dependencies never reach the product.
//   - trace is the recorded production load that demonstrations and simulations replay.
//   - results has the last figures and README.md, which says what each field means and
//     how the figures come about.
//
// Benchmarks of single functions stay beside the function, in the *_test.go files of its
// package; make bench-compare runs those against another commit.
package bench
