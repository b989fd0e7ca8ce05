package algorithms

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
)

// Kind is the type of a parameter.
type Kind string

// The kinds. The Go type of a decoded value stands behind each.
const (
	Float       Kind = "float"       // float64
	Int         Kind = "int"         // int64
	Categorical Kind = "categorical" // string
	Boolean     Kind = "boolean"     // bool
)

// Limits of a Space.
const (
	MaxParams  = 64      // parameters of one Space
	MaxChoices = 256     // choices of one categorical parameter
	maxInt     = 1 << 40 // integers beyond it lose exactness in the unit cube
	maxFloat   = 1e150   // beyond it differences of squares overflow
)

// Param is one parameter of a Space.
type Param struct {
	Name string `json:"name"`
	Kind Kind   `json:"kind"`
	// Min and Max bound a Float or Int, both included; Min < Max (Min = Max is allowed
	// for Int). For Int they must be whole and within ±2^40.
	Min float64 `json:"min,omitempty"`
	Max float64 `json:"max,omitempty"`
	// Log spreads a Float (Min > 0) or Int (Min ≥ 1) evenly over orders of magnitude.
	Log bool `json:"log,omitempty"`
	// Choices of a Categorical: 1 to MaxChoices distinct non-empty strings.
	Choices []string `json:"choices,omitempty"`
	// When makes the parameter conditional: it takes part only while the condition
	// holds. Nil means always.
	When *Condition `json:"when,omitempty"`
}

// Condition holds while the parameter named Param, declared earlier, takes part itself
// and has one of the values In. Only Int, Categorical and Boolean can be asked about.
type Condition struct {
	Param string `json:"param"`
	In    []any  `json:"in"`
}

// Params is one setting: parameter name to value (float64, int64, string or bool by
// Kind). Parameters whose condition does not hold are absent.
type Params map[string]any

// Space is an immutable, validated list of parameters and its map to the unit cube:
// one coordinate per parameter in declaration order. Choices and integers own equal
// bins of [0,1] (log-sized for Log), whose centre is the canonical coordinate; the
// canonical coordinate of a parameter that takes no part is 0.5, so it adds no distance.
type Space struct{ params []dim }

type dim struct {
	Param
	parent int      // index of When.Param, or -1
	in     []string // keys of When.In
}

// NewSpace validates params, of which there must be 1 to MaxParams. Errors have kind
// Invalid and name the parameter and the remedy. The arguments are copied.
func NewSpace(params ...Param) (*Space, error) {
	if len(params) == 0 || len(params) > MaxParams {
		return nil, outrigger.Errorf(outrigger.Invalid, "space: %d parameters, want 1 to %d", len(params), MaxParams)
	}
	s := &Space{params: make([]dim, 0, len(params))}
	for i, p := range params {
		if p.Name == "" || len(p.Name) > 256 || !utf8.ValidString(p.Name) {
			return nil, outrigger.Errorf(outrigger.Invalid, "space: parameter %d: name %q must be 1 to 256 bytes of UTF-8", i, p.Name)
		}
		if s.index(p.Name) >= 0 {
			return nil, outrigger.Errorf(outrigger.Invalid, "space: parameter %q is declared twice", p.Name)
		}
		if err := p.validate(); err != nil {
			return nil, err
		}
		d := dim{Param: p, parent: -1}
		d.Choices = slices.Clone(p.Choices)
		if err := s.bind(&d); err != nil {
			return nil, err
		}
		s.params = append(s.params, d)
	}
	return s, nil
}

func (p Param) validate() error {
	bad := func(format string, args ...any) error {
		return outrigger.Errorf(outrigger.Invalid, "space: parameter %q: "+format, append([]any{p.Name}, args...)...)
	}
	numeric := p.Kind == Float || p.Kind == Int
	switch {
	case !numeric && p.Kind != Categorical && p.Kind != Boolean:
		return bad("kind %q is none of float, int, categorical, boolean", p.Kind)
	case !numeric && (p.Min != 0 || p.Max != 0 || p.Log):
		return bad("min, max and log do not apply to kind %s; remove them", p.Kind)
	case p.Kind != Categorical && len(p.Choices) > 0:
		return bad("choices do not apply to kind %s; remove them or make it categorical", p.Kind)
	case p.Kind == Categorical && (len(p.Choices) == 0 || len(p.Choices) > MaxChoices):
		return bad("%d choices, want 1 to %d", len(p.Choices), MaxChoices)
	case p.Kind == Float && !(p.Min < p.Max && math.Abs(p.Min) <= maxFloat && math.Abs(p.Max) <= maxFloat):
		return bad("bounds [%v, %v] must satisfy min < max within ±%g", p.Min, p.Max, maxFloat)
	case p.Kind == Int && !(p.Min <= p.Max && math.Abs(p.Min) <= maxInt && math.Abs(p.Max) <= maxInt &&
		p.Min == math.Trunc(p.Min) && p.Max == math.Trunc(p.Max)):
		return bad("bounds [%v, %v] must be whole numbers, min ≤ max, within ±2^40", p.Min, p.Max)
	case p.Log && p.Kind == Float && p.Min < 1e-150, p.Log && p.Kind == Int && p.Min < 1:
		return bad("a log scale needs min above 0 (a float at least 1e-150, an int at least 1), have %v", p.Min)
	}
	for i, c := range p.Choices {
		if c == "" || len(c) > 4096 || !utf8.ValidString(c) || slices.Index(p.Choices, c) != i {
			return bad("choice %d (%q) must be distinct UTF-8 of 1 to 4096 bytes", i, c)
		}
	}
	return nil
}

// bind resolves the condition of d against the parameters declared so far.
func (s *Space) bind(d *dim) error {
	if d.When == nil {
		return nil
	}
	w := Condition{Param: d.When.Param, In: slices.Clone(d.When.In)}
	d.When, d.parent = &w, s.index(w.Param)
	if d.parent < 0 {
		return outrigger.Errorf(outrigger.Invalid, "space: parameter %q depends on %q, which is not declared before it", d.Name, w.Param)
	}
	parent := s.params[d.parent]
	if parent.Kind == Float {
		return outrigger.Errorf(outrigger.Invalid, "space: parameter %q depends on the float %q; a condition needs an int, categorical or boolean", d.Name, w.Param)
	}
	if len(w.In) == 0 || len(w.In) > MaxChoices {
		return outrigger.Errorf(outrigger.Invalid, "space: parameter %q: condition on %q lists %d values, want 1 to %d", d.Name, w.Param, len(w.In), MaxChoices)
	}
	for i, v := range w.In {
		n, err := parent.normalise(v)
		if err != nil {
			return err
		}
		w.In[i] = n
		d.in = append(d.in, valueKey(n))
	}
	return nil
}

// valueKey makes discrete values comparable as strings.
func valueKey(v any) string {
	switch v := v.(type) {
	case int64:
		return strconv.FormatInt(v, 10)
	case bool:
		return strconv.FormatBool(v)
	case string:
		return v
	}
	return ""
}

func (s *Space) index(name string) int {
	return slices.IndexFunc(s.params, func(d dim) bool { return d.Name == name })
}

// Len returns the number of parameters, which is the dimension of the unit cube.
func (s *Space) Len() int { return len(s.params) }

// Params returns a copy of the declarations, in order.
func (s *Space) Params() []Param {
	out := make([]Param, len(s.params))
	for i, d := range s.params {
		out[i] = d.Param
		out[i].Choices = slices.Clone(d.Choices)
		if d.When != nil {
			out[i].When = &Condition{Param: d.When.Param, In: slices.Clone(d.When.In)}
		}
	}
	return out
}

// MarshalJSON writes the declarations as a JSON array.
func (s *Space) MarshalJSON() ([]byte, error) { return json.Marshal(s.Params()) }

// UnmarshalJSON reads and validates what MarshalJSON wrote.
func (s *Space) UnmarshalJSON(b []byte) error {
	var ps []Param
	if err := json.Unmarshal(b, &ps); err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "space")
	}
	n, err := NewSpace(ps...)
	if err != nil {
		return err
	}
	*s = *n
	return nil
}

// Decode maps a point of the unit cube to a setting. Coordinates outside [0,1] are
// clamped and NaN counts as 0.5, so the result is always inside the space. Only a point
// of the wrong length is an error, of kind Invalid.
func (s *Space) Decode(u []float64) (Params, error) {
	if len(u) != len(s.params) {
		return nil, outrigger.Errorf(outrigger.Invalid, "point has %d coordinates, the space has %d parameters", len(u), len(s.params))
	}
	out := make(Params, len(u))
	for i := range s.params {
		if d := &s.params[i]; s.active(d, out) {
			out[d.Name] = d.decode(clamp01(u[i]))
		}
	}
	return out, nil
}

// Encode maps a setting to its canonical point. Every parameter that takes part must
// be there, no other may be, and each value must be inside its bounds; numbers may be
// any Go number, as long as an int is whole. Errors have kind Invalid.
func (s *Space) Encode(p Params) ([]float64, error) {
	_, u, err := s.read(p)
	return u, err
}

// Normalise returns the setting with every value in the Go type of its kind, by the rules
// of Encode: what comes from JSON has floats for ints.
func (s *Space) Normalise(p Params) (Params, error) {
	norm, _, err := s.read(p)
	return norm, err
}

// read checks a setting and returns it normalised and as a point.
func (s *Space) read(p Params) (Params, []float64, error) {
	u := make([]float64, len(s.params))
	norm := make(Params, len(p))
	for i := range s.params {
		d := &s.params[i]
		v, given := p[d.Name]
		if !s.active(d, norm) {
			if given {
				return nil, nil, outrigger.Errorf(outrigger.Invalid, "parameter %q takes no part here: its condition on %q does not hold; leave it out", d.Name, d.When.Param)
			}
			u[i] = 0.5
			continue
		}
		if !given {
			return nil, nil, outrigger.Errorf(outrigger.Invalid, "parameter %q is missing", d.Name)
		}
		n, err := d.normalise(v)
		if err != nil {
			return nil, nil, err
		}
		norm[d.Name] = n
		u[i] = d.encode(n)
	}
	for name := range p {
		if s.index(name) < 0 {
			return nil, nil, outrigger.Errorf(outrigger.Invalid, "parameter %q is not in the space", name)
		}
	}
	return norm, u, nil
}

// Check reports whether p is a setting of the space, by the rules of Encode.
func (s *Space) Check(p Params) error {
	_, err := s.Encode(p)
	return err
}

// canonical returns u snapped to bin centres, with 0.5 where a parameter takes no part.
func (s *Space) canonical(u []float64) []float64 {
	out := make([]float64, len(u))
	seen := make(Params, len(u))
	for i := range s.params {
		d := &s.params[i]
		if !s.active(d, seen) {
			out[i] = 0.5
			continue
		}
		out[i] = clamp01(u[i])
		if d.Kind != Float {
			v := d.decode(out[i])
			seen[d.Name] = v
			out[i] = d.encode(v)
		}
	}
	return out
}

func (s *Space) active(d *dim, have Params) bool {
	if d.parent < 0 {
		return true
	}
	v, ok := have[s.params[d.parent].Name]
	return ok && slices.Contains(d.in, valueKey(v))
}

// bins is the number of distinct values, 0 for a Float.
func (d *dim) bins() float64 {
	switch d.Kind {
	case Int:
		return d.Max - d.Min + 1
	case Categorical:
		return float64(len(d.Choices))
	case Boolean:
		return 2
	}
	return 0
}

// unordered reports whether distance between values means nothing beyond "different".
func (d *dim) unordered() bool { return d.Kind == Categorical || d.Kind == Boolean }

// logEnds are the logarithms of the outer edges of the scale; an Int is widened by half
// a unit so that the first and last value get full bins.
func (d *dim) logEnds() (lo, hi float64) {
	if d.Kind == Int {
		return math.Log(d.Min - 0.5), math.Log(d.Max + 0.5)
	}
	return math.Log(d.Min), math.Log(d.Max)
}

func (d *dim) decode(u float64) any {
	var x float64
	if d.Log {
		lo, hi := d.logEnds()
		x = math.Exp(lo + u*(hi-lo))
		if d.Kind == Int {
			return int64(min(max(math.Round(x), d.Min), d.Max))
		}
		return min(max(x, d.Min), d.Max)
	}
	bin := min(math.Floor(u*d.bins()), d.bins()-1)
	switch d.Kind {
	case Int:
		return int64(d.Min + bin)
	case Categorical:
		return d.Choices[int(bin)]
	case Boolean:
		return bin == 1
	}
	return min(max(d.Min*(1-u)+d.Max*u, d.Min), d.Max)
}

// encode takes a value as normalise returns it.
func (d *dim) encode(v any) float64 {
	var bin float64
	switch v := v.(type) {
	case float64:
		if d.Log {
			lo, hi := d.logEnds()
			return clamp01((math.Log(v) - lo) / (hi - lo))
		}
		return clamp01((v - d.Min) / (d.Max - d.Min))
	case int64:
		if d.Log {
			lo, hi := d.logEnds()
			return clamp01((math.Log(float64(v)) - lo) / (hi - lo))
		}
		bin = float64(v) - d.Min
	case string:
		bin = float64(slices.Index(d.Choices, v))
	case bool:
		if v {
			bin = 1
		}
	}
	return (bin + 0.5) / d.bins()
}

// normalise brings v to the Go type of the kind and checks its bounds.
func (d *dim) normalise(v any) (any, error) {
	bad := func() error {
		switch d.Kind {
		case Categorical:
			return outrigger.Errorf(outrigger.Invalid, "parameter %q: %v is not one of the choices %q", d.Name, v, d.Choices)
		case Boolean:
			return outrigger.Errorf(outrigger.Invalid, "parameter %q: %v is not a boolean", d.Name, v)
		}
		return outrigger.Errorf(outrigger.Invalid, "parameter %q: %v is not a %s in [%v, %v]", d.Name, v, d.Kind, d.Min, d.Max)
	}
	switch d.Kind {
	case Categorical:
		if c, ok := v.(string); ok && slices.Contains(d.Choices, c) {
			return c, nil
		}
		return nil, bad()
	case Boolean:
		if b, ok := v.(bool); ok {
			return b, nil
		}
		return nil, bad()
	}
	x, ok := number(v)
	if !ok || !(x >= d.Min && x <= d.Max) || d.Kind == Int && x != math.Trunc(x) {
		return nil, bad()
	}
	if d.Kind == Int {
		return int64(x), nil
	}
	return x, nil
}

func number(v any) (float64, bool) {
	switch v := v.(type) {
	case float64:
		return v, true
	case float32:
		return float64(v), true
	case int:
		return float64(v), true
	case int32:
		return float64(v), true
	case int64:
		return float64(v), true
	case json.Number:
		f, err := v.Float64()
		return f, err == nil
	}
	return 0, false
}

func clamp01(x float64) float64 {
	if math.IsNaN(x) {
		return 0.5
	}
	return min(max(x, 0), 1)
}
