package outrigger

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Limits on what one variable may declare. Constraints are kept in memory with every
// variable and applied to every write, so both their size and their cost are bounded.
const (
	MaxConstraintsBytes = 64 << 10 // of constraints_json, as given and as written back
	MaxPatternBytes     = 1 << 10
	MaxPatternSize      = 5000    // instructions a pattern compiles to; repeats multiply
	MaxPatternSteps     = 1 << 26 // instructions × bytes of one matched string
)

// Constraints limit the values of one variable. A nil pointer or empty slice means
// "not limited". Which fields apply depends on the type; a field that does not apply
// is refused at registration.
//
//	float, integer   min, max (NaN and the infinities bypass both, as in the bridge);
//	                 the limits are 64-bit floats, integers are compared exactly with them
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
// Unknown and repeated keys are refused, because a misspelt limit is no limit. Errors
// have kind Invalid, or Exhausted beyond MaxConstraintsBytes.
func ParseConstraints(raw string) (Constraints, error) {
	text := []byte(strings.Trim(raw, jsonSpace))
	if len(text) == 0 {
		return Constraints{}, nil
	}
	if len(text) > MaxConstraintsBytes {
		return Constraints{}, tooManyConstraints(len(text))
	}
	if err := checkJSON("constraints_json", text); err != nil {
		return Constraints{}, err
	}
	if err := checkFields(text); err != nil {
		return Constraints{}, err
	}
	var c Constraints
	if err := json.Unmarshal(text, &c); err != nil {
		return Constraints{}, Errorf(Invalid, "constraints_json %s: %v", clip(text), err)
	}
	if n := len(c.JSON()); n > MaxConstraintsBytes { // escapes may be longer than what they replace
		return Constraints{}, tooManyConstraints(n)
	}
	return c, nil
}

func tooManyConstraints(n int) error {
	return Errorf(Exhausted, "constraints_json is %d bytes, the limit is %d; list fewer choices", n, MaxConstraintsBytes)
}

// checkFields refuses keys that name no constraint; decoding into the struct would
// accept them in any case.
func checkFields(text []byte) error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return Errorf(Invalid, "expected constraints_json to be an object, got %s", clip(text))
	}
	var names []string
	for _, f := range (Constraints{}).fields() {
		names = append(names, f.name)
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if !slices.Contains(names, name) {
			return Errorf(Invalid, "constraints_json has the unknown key %q; use %s", clip([]byte(name)), strings.Join(names, ", "))
		}
	}
	return nil
}

// JSON returns the constraints_json form, which ParseConstraints reads back as it was;
// "" when there are none.
func (c Constraints) JSON() string {
	var out strings.Builder
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(c); err != nil || out.String() == "{}\n" {
		return "" // only a limit that is no JSON number fails; ValidateFor refuses those
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// ValidateFor checks that the constraints make sense for type t.
func (c Constraints) ValidateFor(t Type) error {
	allowed := map[Type][]string{
		Float: {"min", "max"}, Integer: {"min", "max"},
		String: {"min_length", "max_length", "pattern", "enum"},
		Choice: {"choices"}, Module: {"choices", "allowed_modules"},
		Embedding: {"dimensions"}, Tensor: {"shape"},
	}[t]
	for _, f := range c.fields() {
		if f.present && !slices.Contains(allowed, f.name) {
			return Errorf(Invalid, "constraint %s does not apply to type %s (allowed: %s)", f.name, clip([]byte(t)), strings.Join(allowed, ", "))
		}
	}
	if err := c.validateBounds(); err != nil {
		return err
	}
	_, _, err := compilePattern(c.Pattern)
	return err
}

// validateBounds checks the numbers against themselves and each other.
func (c Constraints) validateBounds() error {
	for _, f := range []struct {
		name  string
		limit *float64
	}{{"min", c.Min}, {"max", c.Max}} {
		if f.limit != nil && (math.IsNaN(*f.limit) || math.IsInf(*f.limit, 0)) {
			return Errorf(Invalid, "constraint %s is %v; give a finite number or leave it out", f.name, *f.limit)
		}
	}
	for _, f := range []struct {
		name  string
		limit *int
	}{{"min_length", c.MinLength}, {"max_length", c.MaxLength}, {"dimensions", c.Dimensions}} {
		if f.limit != nil && *f.limit < 0 {
			return Errorf(Invalid, "constraint %s is %d; it counts something, so give 0 or more", f.name, *f.limit)
		}
	}
	if _, err := elements(c.Shape); err != nil {
		return Errorf(Invalid, "constraint shape can never be met: %v", err)
	}
	if c.Min != nil && c.Max != nil && *c.Min > *c.Max {
		return Errorf(Invalid, "constraint min %v is above max %v", *c.Min, *c.Max)
	}
	if c.MinLength != nil && c.MaxLength != nil && *c.MinLength > *c.MaxLength {
		return Errorf(Invalid, "constraint min_length %d is above max_length %d", *c.MinLength, *c.MaxLength)
	}
	return nil
}

// field is one key of constraints_json.
type field struct {
	name    string
	present bool
}

// fields lists all of them in documentation order.
func (c Constraints) fields() []field {
	return []field{
		{"min", c.Min != nil}, {"max", c.Max != nil},
		{"min_length", c.MinLength != nil}, {"max_length", c.MaxLength != nil},
		{"pattern", c.Pattern != ""}, {"enum", len(c.Enum) > 0},
		{"choices", len(c.Choices) > 0}, {"allowed_modules", len(c.AllowedModules) > 0},
		{"dimensions", c.Dimensions != nil}, {"shape", len(c.Shape) > 0},
	}
}

// Check tests one normalised value. The texts are those bridge clients know, for
// example "value 1.5 is above maximum 1.0", with quoted values shortened to 64 bytes.
// Errors have kind Invalid, or Exhausted when matching would take more than
// MaxPatternSteps.
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
	if c.Min != nil && compare(v, f, *c.Min) < 0 {
		return Errorf(Invalid, "value %s is below minimum %s", clip(v.JSON), limitText(v.Type, *c.Min))
	}
	if c.Max != nil && compare(v, f, *c.Max) > 0 {
		return Errorf(Invalid, "value %s is above maximum %s", clip(v.JSON), limitText(v.Type, *c.Max))
	}
	return nil
}

// compare orders a number, whose float form is f, and a limit. As floats, integers above
// 2^53 would round, and one too many could pass for the limit.
func compare(v Value, f, limit float64) int {
	n, ok := wholeNumber(string(v.JSON))
	if v.Type != Integer || !ok || math.Abs(limit) >= 1<<63 {
		return cmp.Compare(f, limit)
	}
	whole := math.Floor(limit)
	if order := cmp.Compare(n, int64(whole)); order != 0 || whole == limit {
		return order
	}
	return -1 // n is the integer just below a fractional limit
}

// limitText prints a limit as the bridge does: 1.0 for a float, 1 for an integer, with
// an exponent only where JSON writes one.
func limitText(t Type, f float64) string {
	format := byte('f')
	if abs := math.Abs(f); f != 0 && (abs < 1e-6 || abs >= 1e21) {
		format = 'e'
	}
	s := strconv.FormatFloat(f, format, -1, 64)
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
		return Errorf(Invalid, "value %s is not one of %s", quote(s), quoteAll(c.Enum))
	}
	return c.checkPattern(s)
}

func (c Constraints) checkPattern(s string) error {
	if c.Pattern == "" {
		return nil
	}
	re, size, err := compilePattern(c.Pattern)
	if err != nil {
		return err
	}
	if steps := size * len(s); steps > MaxPatternSteps {
		return Errorf(Exhausted, "matching %d bytes with a pattern of %d instructions takes %d steps, the limit is %d; shorten the value or the pattern", len(s), size, steps, MaxPatternSteps)
	}
	if re == nil && !strings.Contains(s, c.Pattern) || re != nil && !re.MatchString(s) {
		return Errorf(Invalid, "value %s does not match pattern %q", quote(s), c.Pattern)
	}
	return nil
}

// compilePattern returns the expression and about how many instructions it has; nil for
// one that is no expression and therefore matches literally. One that RE2 only finds too
// large is refused: whoever wrote it did not mean it literally.
func compilePattern(pattern string) (*regexp.Regexp, int, error) {
	if len(pattern) > MaxPatternBytes {
		return nil, 0, Errorf(Invalid, "constraint pattern is %d bytes long, the limit is %d; shorten it", len(pattern), MaxPatternBytes)
	}
	tree, err := syntax.Parse(pattern, syntax.Perl)
	var serr *syntax.Error
	switch {
	case errors.As(err, &serr) && slices.Contains([]syntax.ErrorCode{syntax.ErrInvalidRepeatSize, syntax.ErrLarge, syntax.ErrNestingDepth}, serr.Code):
		return nil, 0, Errorf(Invalid, "constraint pattern %q is too large (%s); lower its repeat counts", pattern, serr.Code)
	case err != nil:
		return nil, 1, nil
	}
	size := instructions(tree)
	if size > MaxPatternSize {
		return nil, 0, Errorf(Invalid, "constraint pattern %q compiles to %d instructions, the limit is %d; lower its repeat counts", pattern, size, MaxPatternSize)
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, 0, Errorf(Invalid, "constraint pattern %q: %v", pattern, err)
	}
	return re, size, nil
}

// instructions estimates the size of the compiled program before it is built. The
// parser bounds nested repeats to 1000 in all and the text is short, so it cannot overflow.
func instructions(re *syntax.Regexp) int {
	sum := 2
	for _, sub := range re.Sub {
		sum += instructions(sub)
	}
	switch re.Op {
	case syntax.OpLiteral:
		return len(re.Rune)
	case syntax.OpRepeat:
		return sum * max(re.Min, re.Max, 1)
	}
	return sum
}

func (c Constraints) checkChoice(v Value) error {
	s, err := v.Text()
	if err != nil {
		return err
	}
	all := slices.Concat(c.Choices, c.AllowedModules)
	if len(all) > 0 && !slices.Contains(all, s) {
		return Errorf(Invalid, "value %s is not one of the allowed choices %s", quote(s), quoteAll(all))
	}
	return nil
}

func (c Constraints) checkEmbedding(v Value) error {
	if c.Dimensions == nil {
		return nil
	}
	n, err := countNumbers(v.JSON, 1)
	if err != nil {
		return err
	}
	if n != *c.Dimensions {
		return Errorf(Invalid, "embedding has %d dimensions, expected %d", n, *c.Dimensions)
	}
	return nil
}

func (c Constraints) checkTensor(v Value) error {
	if len(c.Shape) == 0 {
		return nil
	}
	shape, _, err := tensorParts(v.JSON)
	if err != nil {
		return err
	}
	if !slices.Equal(shape, c.Shape) {
		return Errorf(Invalid, "tensor has shape %s, expected %s", shapeText(shape), shapeText(c.Shape))
	}
	return nil
}

// quote shortens and quotes a value for an error message.
func quote(s string) string { return strconv.Quote(clip([]byte(s))) }

// quoteAll prints a list of allowed values as %q does, but not without end.
func quoteAll(all []string) string {
	const most = 16
	text := make([]string, min(len(all), most))
	for i := range text {
		text[i] = quote(all[i])
	}
	if len(all) > most {
		text = append(text, fmt.Sprintf("and %d more", len(all)-most))
	}
	return "[" + strings.Join(text, " ") + "]"
}
