// Package algorithms holds the optimisers of the mesh and the rules that choose among
// them: what setting of the variables should be evaluated next, given every result so
// far.
//
// # Use
//
//	space, err := algorithms.NewSpace(
//		algorithms.Param{Name: "temperature", Kind: algorithms.Float, Min: 0, Max: 2},
//		algorithms.Param{Name: "template", Kind: algorithms.Categorical, Choices: []string{"plain", "cot"}},
//		algorithms.Param{Name: "steps", Kind: algorithms.Int, Min: 1, Max: 8,
//			When: &algorithms.Condition{Param: "template", In: []any{"cot"}}})
//	opt, err := algorithms.New("bayesian_optimization", algorithms.Config{Space: space, Seed: 7, Budget: 50})
//	for trials := opt.Ask(4); len(trials) > 0; trials = opt.Ask(4) {
//		err = opt.Tell(evaluate(trials))
//	}
//	best, ok := opt.Best()
//
// The loss is minimised. Evaluations may run anywhere, in parallel, and end in any
// order; the caller owns their deadlines. An evaluation that will never end is told as
// Failed. State and Restore carry an optimiser over a restart exactly: the restored one
// continues with the same trials the old one would have asked.
//
// # Promises
//
// Everything is a function of the arguments: the same Config and the same sequence of
// Ask, Tell and Restore give the same trials bit for bit, on one processor
// architecture (Go may fuse multiplications and additions on others). Every trial lies
// inside its Space. At most Config.Budget trials are asked. Memory is bounded: Budget,
// the parameters of a Space and the pending trials have stated limits.
//
// Bad input is an outrigger.Error of kind Invalid that names the field, and changes
// nothing. A state that was damaged or made by another version is refused by Restore;
// it never panics. Nothing here does I/O, reads a clock or starts a goroutine; the
// shell around it supplies deadlines and isolation from panics of foreign algorithms.
//
// # Concurrency
//
// A Space, an Algorithm and a Choice are immutable and may be shared. An Optimizer, a
// History and the *rand.Rand passed to Select belong to one goroutine at a time.
//
// # Choosing
//
// Select picks an algorithm for a Task by one of four strategies: performance_weighted,
// feature_matching, adaptive, experimental. It always answers, with a reason; where a
// strategy has nothing to go by it falls back and says so. History keeps the scores,
// keyed by task type. SanityTask is the entrance examination of a foreign algorithm.
package algorithms
