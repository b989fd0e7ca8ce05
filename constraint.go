package outrigger

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Constraints limit the values of one variable. A nil pointer or empty slice means
// "not limited". Which fields apply depends on the type; a field that does not apply
// is refused at registration.
//
//	float, integer   min, max (NaN and the infinities bypass both, as the seed does)
//	string           min_length, max_length (in characters), pattern (RE2, unanchored;
//	                 an invalid expression is matched literally), enum
//	choice           choices
//	module           choices (alias allowed_modules)
//	embedding        dimensions
//	tensor           shape (exact)
type Constraints struct {
	Min            *float64 `json:"min,omitempty"`
	Max            *float64 `json:"max,omitempty"`
	MinLength      *int     `json:"min_length,omitempty"`
	MaxLength      *int     `json:"max_length,omitempty"`
	Pattern        string   `json:"pattern,omitempty"`
	Enum           []string `json:"enum,omitempty"`
	Choices        []string `json:"choices,omitempty"`
	AllowedModules []string `json:"allowed_modules,omitempty"`
	Dimensions     *int     `json:"dimensions,omitempty"`
	Shape          []int    `json:"shape,omitempty"`
}

// ParseConstraints reads the constraints_json of the bridge protocol; empty means none.
// Unknown keys are refused, because a misspelt limit is no limit. Errors have kind Invalid.
func ParseConstraints(raw string) (Constraints, error) {
	var c Constraints
	if strings.TrimSpace(raw) == "" {
		return c, nil
	}
	dec := json.NewDecoder(bytes.NewReader([]byte(raw)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return c, Errorf(Invalid, "constraints_json %s: %v", clip([]byte(raw)), err)
	}
	return c, nil
}

// JSON returns the constraints_json form; "" when there are none.
func (c Constraints) JSON() string {
	b, err := json.Marshal(c)
	if err != nil || string(b) == "{}" {
		return ""
	}
	return string(b)
}

// ValidateFor checks that the constraints make sense for type t.
func (c Constraints) ValidateFor(t Type) error {
	allowed := map[Type][]string{
		Float: {"min", "max"}, Integer: {"min", "max"},
		String: {"min_length", "max_length", "pattern", "enum"},
		Choice: {"choices"}, Module: {"choices", "allowed_modules"},
		Embedding: {"dimensions"}, Tensor: {"shape"},
	}[t]
	for _, f := range c.set() {
		if !slices.Contains(allowed, f) {
			return Errorf(Invalid, "constraint %s does not apply to type %s (allowed: %s)", f, t, strings.Join(allowed, ", "))
		}
	}
	if c.Min != nil && c.Max != nil && *c.Min > *c.Max {
		return Errorf(Invalid, "constraint min %v is above max %v", *c.Min, *c.Max)
	}
	if c.MinLength != nil && c.MaxLength != nil && *c.MinLength > *c.MaxLength {
		return Errorf(Invalid, "constraint min_length %d is above max_length %d", *c.MinLength, *c.MaxLength)
	}
	return nil
}

// set lists the names of the fields that are present.
func (c Constraints) set() []string {
	present := []struct {
		name string
		on   bool
	}{
		{"min", c.Min != nil}, {"max", c.Max != nil},
		{"min_length", c.MinLength != nil}, {"max_length", c.MaxLength != nil},
		{"pattern", c.Pattern != ""}, {"enum", len(c.Enum) > 0},
		{"choices", len(c.Choices) > 0}, {"allowed_modules", len(c.AllowedModules) > 0},
		{"dimensions", c.Dimensions != nil}, {"shape", len(c.Shape) > 0},
	}
	var out []string
	for _, p := range present {
		if p.on {
			out = append(out, p.name)
		}
	}
	return out
}

// Check tests one normalised value. The texts are those bridge clients know, for
// example "value 1.5 is above maximum 1.0". Errors have kind Invalid.
func (c Constraints) Check(v Value) error {
	if len(v.Binary) > 0 {
		return nil // opaque: never decoded, so never checked
	}
	switch v.Type {
	case Float, Integer:
		return c.checkNumber(v)
	case String:
		return c.checkString(v)
	case Choice, Module:
		return c.checkChoice(v)
	case Embedding:
		return c.checkEmbedding(v)
	case Tensor:
		return c.checkTensor(v)
	}
	return nil
}

func (c Constraints) checkNumber(v Value) error {
	f, err := v.Float64()
	if err != nil {
		return err
	}
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return nil
	}
	if c.Min != nil && f < *c.Min {
		return Errorf(Invalid, "value %s is below minimum %s", v.JSON, limitText(v.Type, *c.Min))
	}
	if c.Max != nil && f > *c.Max {
		return Errorf(Invalid, "value %s is above maximum %s", v.JSON, limitText(v.Type, *c.Max))
	}
	return nil
}

// limitText prints a limit as the bridge does: 1.0 for a float, 1 for an integer.
func limitText(t Type, f float64) string {
	s := strconv.FormatFloat(f, 'g', -1, 64)
	if t == Float && !strings.ContainsAny(s, ".eIN") {
		s += ".0"
	}
	return s
}

func (c Constraints) checkString(v Value) error {
	s, err := v.Text()
	if err != nil {
		return err
	}
	n := utf8.RuneCountInString(s)
	if c.MinLength != nil && n < *c.MinLength {
		return Errorf(Invalid, "string length %d is below minimum length %d", n, *c.MinLength)
	}
	if c.MaxLength != nil && n > *c.MaxLength {
		return Errorf(Invalid, "string length %d is above maximum length %d", n, *c.MaxLength)
	}
	if len(c.Enum) > 0 && !slices.Contains(c.Enum, s) {
		return Errorf(Invalid, "value %q is not one of %q", s, c.Enum)
	}
	if c.Pattern == "" {
		return nil
	}
	re, rerr := regexp.Compile(c.Pattern)
	if rerr != nil {
		re = regexp.MustCompile(regexp.QuoteMeta(c.Pattern))
	}
	if !re.MatchString(s) {
		return Errorf(Invalid, "value %q does not match pattern %q", s, c.Pattern)
	}
	return nil
}

func (c Constraints) checkChoice(v Value) error {
	s, err := v.Text()
	if err != nil {
		return err
	}
	all := append(slices.Clone(c.Choices), c.AllowedModules...)
	if len(all) > 0 && !slices.Contains(all, s) {
		return Errorf(Invalid, "value %q is not one of the allowed choices %q", s, all)
	}
	return nil
}

func (c Constraints) checkEmbedding(v Value) error {
	if c.Dimensions == nil {
		return nil
	}
	var xs []float64
	if err := json.Unmarshal(v.JSON, &xs); err != nil {
		return Errorf(Invalid, "embedding: %v", err)
	}
	if len(xs) != *c.Dimensions {
		return Errorf(Invalid, "embedding has %d dimensions, expected %d", len(xs), *c.Dimensions)
	}
	return nil
}

func (c Constraints) checkTensor(v Value) error {
	if len(c.Shape) == 0 {
		return nil
	}
	shape, _, err := tensorShape(v.JSON)
	if err != nil {
		return err
	}
	if !slices.Equal(shape, c.Shape) {
		return Errorf(Invalid, "tensor has shape %s, expected %s", fmt.Sprint(shape), fmt.Sprint(c.Shape))
	}
	return nil
}
