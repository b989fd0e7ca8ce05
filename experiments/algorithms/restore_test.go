package algorithms

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"slices"
	"testing"
)

// statesOf returns states of a at several ages, with trials pending.
func statesOf(t testing.TB, a Algorithm) (out [][]byte) {
	for _, n := range []int{0, 3, 14, 25} {
		o := start1(t, a, Config{Space: suited(t, a), Seed: 3, Budget: 30})
		for trials := o.Ask(2); len(trials) > 0; trials = o.Ask(2) {
			if n -= len(trials); n < 0 {
				break
			}
			for _, tr := range trials {
				tell(t, o, Result{ID: tr.ID, Loss: mixedLoss(tr.Params)})
			}
		}
		out = append(out, o.State())
	}
	return out
}

// survive states the law of Restore: what it accepts runs on without a panic, inside
// the space, can be saved again, and never falls silent with budget left.
func survive(t testing.TB, state []byte) (accepted bool) {
	o, err := Restore(state)
	if err != nil {
		return false
	}
	var head struct {
		Config  Config    `json:"config"`
		Pending []pending `json:"pending"`
	}
	if err := json.Unmarshal(state, &head); err != nil {
		t.Fatal(err)
	}
	for _, p := range head.Pending {
		tell(t, o, Result{ID: p.ID, Loss: float64(p.ID)})
	}
	left := true
	for i := 0; i < 15 && left; i++ {
		trials := o.Ask(1)
		left = len(trials) > 0
		for _, tr := range trials {
			if err := head.Config.Space.Check(tr.Params); err != nil {
				t.Fatalf("%v\nafter restoring %s", err, state)
			}
			tell(t, o, Result{ID: tr.ID, Loss: float64(i%3) - 1})
		}
	}
	var end struct {
		Asked int `json:"asked"`
	}
	if err := json.Unmarshal(o.State(), &end); err != nil || !left && end.Asked < head.Config.Budget {
		t.Fatalf("fell silent after %d of %d (%v)\nafter restoring %s", end.Asked, head.Config.Budget, err, state)
	}
	return true
}

// damage replaces node number pick of the JSON tree (counting from the root, modulo the
// size of the tree) by something else. It returns the size, 0 if state is not JSON.
func damage(state []byte, pick, with int) (out []byte, nodes int) {
	dec := json.NewDecoder(bytes.NewReader(state))
	dec.UseNumber()
	var tree any
	if dec.Decode(&tree) != nil {
		return state, 0
	}
	count(tree, &nodes)
	pick %= nodes
	tree = replace(tree, &pick, with)
	out, err := json.Marshal(tree)
	if err != nil {
		return state, 0
	}
	return out, nodes
}

func count(v any, n *int) {
	*n++
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			count(e, n)
		}
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			count(v[k], n)
		}
	}
}

const damages = 11

func replace(v any, pick *int, with int) any {
	if *pick--; *pick < 0 {
		return spoil(v, with)
	}
	switch v := v.(type) {
	case []any:
		for i := range v {
			if *pick >= 0 {
				v[i] = replace(v[i], pick, with)
			}
		}
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			if *pick >= 0 {
				v[k] = replace(v[k], pick, with)
			}
		}
	}
	return v
}

func spoil(v any, with int) any {
	if l, ok := v.([]any); ok && len(l) > 0 && with%damages >= 8 {
		switch with % damages {
		case 8:
			return l[1:]
		case 9:
			return append(slices.Clone(l), l[0])
		}
		return []any{}
	}
	return []any{nil, 0, 1, -1, 1e300, 0.5, true, "reflect", map[string]any{}, 7, 1e-300}[with%damages]
}

// Every state with one node damaged, a larger sample of them under OUTRIGGER_LONG.
func TestDamagedStates(t *testing.T) {
	stride := 97
	if os.Getenv("OUTRIGGER_LONG") != "" {
		stride = 7 // coprime to the kinds of damage
	}
	accepted, refused := 0, 0
	for _, a := range Builtin() {
		for _, state := range statesOf(t, a) {
			if !survive(t, state) {
				t.Fatalf("%s refuses its own state %s", a.ID, state)
			}
			_, nodes := damage(state, 0, 0)
			for k := 0; k < nodes*damages; k += stride {
				bad, _ := damage(state, k/damages, k%damages)
				if survive(t, bad) {
					accepted++
				} else {
					refused++
				}
			}
		}
	}
	t.Logf("%d damaged states refused, %d accepted and run on", refused, accepted)
	if refused == 0 || accepted == 0 {
		t.Errorf("%d refused, %d accepted: the damage is all of one kind", refused, accepted)
	}
}

// FuzzRestore damages states in two ways: byte by byte, and node by node.
func FuzzRestore(f *testing.F) {
	for _, a := range Builtin() {
		for i, s := range statesOf(f, a) {
			f.Add(s, uint16(37*i), uint8(i))
		}
	}
	f.Fuzz(func(t *testing.T, state []byte, pick uint16, with uint8) {
		survive(t, state)
		if bad, nodes := damage(state, int(pick), int(with)); nodes > 0 {
			survive(t, bad)
		}
	})
}
