package algorithms

import "testing"

func TestBuiltinsPassTheSanityTask(t *testing.T) {
	for _, a := range Builtin() {
		seeds := 5
		if a.ID == "bayesian_optimization" {
			seeds = 3
		}
		if err := (SanityTask{Seeds: seeds}).Check(a); err != nil {
			t.Errorf("%s: %v", a.ID, err)
		}
	}
}
