package algorithms

import (
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func TestSpaceRefusesNonsense(t *testing.T) {
	mode := Param{Name: "mode", Kind: Categorical, Choices: []string{"a", "b"}}
	for _, c := range []struct {
		want string // part of the message
		ps   []Param
	}{
		{"0 parameters", nil},
		{"65 parameters", slices.Repeat([]Param{mode}, 65)},
		{"name", []Param{{Kind: Boolean}}},
		{"twice", []Param{mode, mode}},
		{"kind", []Param{{Name: "x", Kind: "complex"}}},
		{"min < max", []Param{{Name: "x", Kind: Float, Min: 1, Max: 1}}},
		{"min < max", []Param{{Name: "x", Kind: Float, Min: math.NaN(), Max: 1}}},
		{"min < max", []Param{{Name: "x", Kind: Float, Min: 0, Max: math.Inf(1)}}},
		{"whole", []Param{{Name: "x", Kind: Int, Min: 0.5, Max: 3}}},
		{"2^40", []Param{{Name: "x", Kind: Int, Min: 0, Max: 1 << 41}}},
		{"log", []Param{{Name: "x", Kind: Float, Min: 0, Max: 1, Log: true}}},
		{"log", []Param{{Name: "x", Kind: Int, Min: 0, Max: 9, Log: true}}},
		{"0 choices", []Param{{Name: "x", Kind: Categorical}}},
		{"distinct", []Param{{Name: "x", Kind: Categorical, Choices: []string{"a", "a"}}}},
		{"do not apply", []Param{{Name: "x", Kind: Boolean, Max: 1}}},
		{"do not apply", []Param{{Name: "x", Kind: Int, Max: 1, Choices: []string{"a"}}}},
		{"not declared before", []Param{{Name: "x", Kind: Boolean, When: &Condition{"mode", []any{"a"}}}, mode}},
		{"not declared before", []Param{{Name: "x", Kind: Boolean, When: &Condition{"x", []any{true}}}}},
		{"not one of the choices", []Param{mode, {Name: "x", Kind: Boolean, When: &Condition{"mode", []any{"c"}}}}},
		{"lists 0 values", []Param{mode, {Name: "x", Kind: Boolean, When: &Condition{"mode", nil}}}},
		{"float", []Param{{Name: "f", Kind: Float, Max: 1}, {Name: "x", Kind: Boolean, When: &Condition{"f", []any{1.0}}}}},
	} {
		_, err := NewSpace(c.ps...)
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("NewSpace(%v) = %v, want Invalid with %q", c.ps, err, c.want)
		}
	}
}

// everyKind is a space with each kind, scale and a chain of conditions.
func everyKind(t testing.TB) *Space {
	t.Helper()
	s, err := NewSpace(
		Param{Name: "warmth", Kind: Float, Min: -1, Max: 3},
		Param{Name: "rate", Kind: Float, Min: 1e-4, Max: 1, Log: true},
		Param{Name: "shots", Kind: Int, Min: -2, Max: 7},
		Param{Name: "tokens", Kind: Int, Min: 1, Max: 4096, Log: true},
		Param{Name: "style", Kind: Categorical, Choices: []string{"plain", "steps", "debate"}},
		Param{Name: "judge", Kind: Boolean, When: &Condition{"style", []any{"debate", "steps"}}},
		Param{Name: "rounds", Kind: Int, Min: 1, Max: 5, When: &Condition{"judge", []any{true}}},
		Param{Name: "extra", Kind: Float, Min: 0, Max: 1, When: &Condition{"shots", []any{7}}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDecodeExamples(t *testing.T) {
	s := everyKind(t)
	for _, c := range []struct {
		u    []float64
		want Params
	}{
		{[]float64{0, 0, 0, 0, 0, 0, 0, 0},
			Params{"warmth": -1.0, "rate": 1e-4, "shots": int64(-2), "tokens": int64(1), "style": "plain"}},
		{[]float64{1, 1, 1, 1, 1, 1, 1, 1},
			Params{"warmth": 3.0, "rate": 1.0, "shots": int64(7), "tokens": int64(4096), "style": "debate", "judge": true, "rounds": int64(5), "extra": 1.0}},
		{[]float64{0.5, 0.5, 0.5, 0.5, 0.5, 0.2, 0.9, 0.9},
			Params{"warmth": 1.0, "rate": 0.01, "shots": int64(3), "tokens": int64(45), "style": "steps", "judge": false}},
		{[]float64{-9, math.NaN(), 9, math.Inf(-1), math.NaN(), 0, 0, math.Inf(1)}, // clamped
			Params{"warmth": -1.0, "rate": 0.01, "shots": int64(7), "tokens": int64(1), "style": "steps", "judge": false, "extra": 1.0}},
	} {
		got, err := s.Decode(c.u)
		if r, ok := got["rate"].(float64); ok && math.Abs(r/c.want["rate"].(float64)-1) < 1e-12 {
			got["rate"] = c.want["rate"]
		}
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("Decode(%v) = %v, %v\nwant %v", c.u, got, err, c.want)
		}
	}
	if _, err := s.Decode([]float64{1}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("a point of the wrong length gave %v", err)
	}
}

func TestEncodeRefuses(t *testing.T) {
	s := everyKind(t)
	good := func() Params {
		return Params{"warmth": 0, "rate": 0.1, "shots": 2.0, "tokens": int64(9), "style": "steps", "judge": true, "rounds": json.Number("2")}
	}
	if err := s.Check(good()); err != nil {
		t.Fatalf("numbers of any Go type should do: %v", err)
	}
	for want, change := range map[string]func(Params){
		`"warmth" is missing`:      func(p Params) { delete(p, "warmth") },
		`"warmth": 3.1 is not`:     func(p Params) { p["warmth"] = 3.1 },
		`"warmth": NaN is not`:     func(p Params) { p["warmth"] = math.NaN() },
		`"shots": 2.5 is not`:      func(p Params) { p["shots"] = 2.5 },
		`"style": 1 is not one`:    func(p Params) { p["style"] = 1 },
		`"judge": yes is not a`:    func(p Params) { p["judge"] = "yes" },
		`"extra" takes no part`:    func(p Params) { p["extra"] = 0.5 },
		`"rounds" takes no part`:   func(p Params) { p["judge"] = false },
		`"rounds" is missing`:      func(p Params) { delete(p, "rounds") },
		`"surprise" is not in the`: func(p Params) { p["surprise"] = 1 },
	} {
		p := good()
		change(p)
		if err := s.Check(p); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("Check gave %v, want Invalid with %s", err, want)
		}
	}
}

// Every value of a discrete parameter owns the same share of the cube, ends included.
func TestBinsAreEqual(t *testing.T) {
	s, err := NewSpace(Param{Name: "n", Kind: Int, Min: 3, Max: 7})
	if err != nil {
		t.Fatal(err)
	}
	count := map[any]int{}
	for i := range 1000 {
		p, err := s.Decode([]float64{(float64(i) + 0.5) / 1000})
		if err != nil {
			t.Fatal(err)
		}
		count[p["n"]]++
	}
	for v := int64(3); v <= 7; v++ {
		if count[v] != 200 {
			t.Errorf("value %d owns %d of 1000 points, want 200", v, count[v])
		}
	}
}

func TestSpaceJSON(t *testing.T) {
	s := everyKind(t)
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var back Space
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(&back)
	if err != nil || string(again) != string(b) {
		t.Errorf("space changed over JSON:\n%s\n%s (%v)", b, again, err)
	}
	if err := json.Unmarshal([]byte(`[{"name":"x","kind":"float","min":2,"max":1}]`), &back); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("invalid space over JSON gave %v", err)
	}
}

// roundTrip states the laws of a space at one point.
func roundTrip(t testing.TB, s *Space, u []float64) {
	p, err := s.Decode(u)
	if err != nil {
		t.Fatal(err)
	}
	e, err := s.Encode(p)
	if err != nil {
		t.Fatalf("Encode(Decode(%v)) = %v", u, err)
	}
	again, err := s.Decode(e)
	if err != nil {
		t.Fatal(err)
	}
	c := s.canonical(u)
	if twice := s.canonical(c); !slices.Equal(c, twice) {
		t.Fatalf("canonical is not idempotent: %v, then %v", c, twice)
	}
	for j, d := range s.params {
		v, w := p[d.Name], again[d.Name]
		if x, ok := v.(float64); ok {
			y, ok := w.(float64)
			// One part in 10^12 of the size of the bounds; a log scale loses what its
			// logarithm loses.
			if size := math.Abs(d.Min) + math.Abs(d.Max); !ok || math.Abs(x-y) > 1e-12*size {
				t.Fatalf("%s: %v came back as %v", d.Name, v, w)
			}
			continue
		}
		if v != w {
			t.Fatalf("%s: %v came back as %v", d.Name, v, w)
		}
		if c[j] != e[j] {
			t.Fatalf("%s: canonical %v, encoded %v", d.Name, c[j], e[j])
		}
	}
	if err := s.Check(again); err != nil {
		t.Fatal(err)
	}
}

// FuzzSpace reads any declaration; if it is accepted, any point must survive the trip
// to a setting and back.
func FuzzSpace(f *testing.F) {
	b, err := json.Marshal(everyKind(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, 0.0, 0.3)
	f.Add(b, 1.0, 0.999)
	f.Add([]byte(`[{"name":"n","kind":"int","min":-1099511627776,"max":1099511627776}]`), 0.123456789, 0.0)
	f.Add([]byte(`[{"name":"n","kind":"int","min":1,"max":1099511627776,"log":true}]`), 0.987654321, 0.0)
	f.Add([]byte(`[{"name":"x","kind":"float","min":-1e150,"max":1e150}]`), 0.25, 0.0)
	f.Add([]byte(`[{"name":"x","kind":"float","min":1e-150,"max":1e150,"log":true}]`), 0.75, 0.0)
	f.Add([]byte(`[{"name":"x","kind":"float","min":0,"max":5e-324}]`), 0.75, 0.0)
	f.Fuzz(func(t *testing.T, raw []byte, first, stride float64) {
		var s Space
		if json.Unmarshal(raw, &s) != nil {
			return
		}
		u := make([]float64, s.Len())
		for j := range u {
			u[j] = math.Mod(first+float64(j)*stride, 1)
		}
		roundTrip(t, &s, u)
	})
}
