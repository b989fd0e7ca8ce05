package mlflow

import (
	"cmp"
	"encoding/base64"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Bounds of a search, which are MLflow's.
const (
	defaultModels   = 100
	mostModels      = 1000
	defaultVersions = 10_000
	mostVersions    = 200_000
	maxFilter       = 4096 // bytes
)

// clause is one comparison of a filter, "name LIKE 'a%'" or "tags.team = 'blue'". Clauses
// are joined by AND.
type clause struct {
	field string // name, run_id, …, or tags
	tag   string // with tags: which
	op    string
	value string
}

// A value is in single or double quotes, or a number; a tag may be quoted by ` or ".
var clauseForm = regexp.MustCompile("(?is)^\\s*(?:(tags?)\\s*\\.\\s*(`[^`]+`|\"[^\"]+\"|[\\w.\\-]+)|([a-z_]+))\\s*(=|!=|<=|>=|<|>|LIKE|ILIKE)\\s*('[^']*'|\"[^\"]*\"|\\d+)\\s*(?:AND\\b|$)")

// parseFilter reads a filter. fields are those that are compared as text, numbers those
// compared as whole numbers.
func parseFilter(text string, fields, numbers []string) ([]clause, error) {
	if len(text) > maxFilter {
		return nil, outrigger.Errorf(outrigger.Invalid, "filter is %d bytes long, the limit is %d", len(text), maxFilter)
	}
	var out []clause
	for rest := text; strings.TrimSpace(rest) != ""; {
		m := clauseForm.FindStringSubmatch(rest)
		if m == nil {
			return nil, outrigger.Errorf(outrigger.Invalid, "filter %q cannot be read at %q; write comparisons such as name = 'chat' AND tags.team LIKE 'b%%' with %s", text, rest, known(fields, numbers))
		}
		c := clause{field: strings.ToLower(m[3]), tag: strings.Trim(m[2], "`\""), op: strings.ToUpper(m[4]), value: strings.Trim(m[5], `'"`)}
		if m[1] != "" {
			c.field = "tags"
		}
		number := slices.Contains(numbers, c.field)
		if c.field != "tags" && !number && !slices.Contains(fields, c.field) {
			return nil, outrigger.Errorf(outrigger.Invalid, "filter %q compares %q; known are %s", text, c.field, known(fields, numbers))
		}
		order := c.op != "=" && c.op != "!=" && c.op != "LIKE" && c.op != "ILIKE"
		if _, err := strconv.ParseInt(c.value, 10, 64); number && (err != nil || strings.HasSuffix(c.op, "LIKE")) || !number && order {
			return nil, outrigger.Errorf(outrigger.Invalid, "filter %q compares %s by %s with %q; numbers take =, !=, <, <=, >, >=, text takes =, !=, LIKE, ILIKE", text, c.field, c.op, c.value)
		}
		if strings.HasSuffix(strings.ToUpper(strings.TrimSpace(m[0])), "AND") && strings.TrimSpace(rest[len(m[0]):]) == "" {
			return nil, outrigger.Errorf(outrigger.Invalid, "filter %q ends with AND", text)
		}
		out, rest = append(out, c), rest[len(m[0]):]
	}
	return out, nil
}

func known(fields, numbers []string) string {
	return strings.Join(slices.Concat(fields, numbers, []string{"tags.NAME"}), ", ")
}

// holds compares text. What is not there differs from everything and is equal to nothing:
// MLflow's clients add "tag.`mlflow.prompt.is_prompt` != 'true'" to every search of models.
func (c *clause) holds(have string, there bool) bool {
	switch c.op {
	case "=":
		return there && have == c.value
	case "!=":
		return !there || have != c.value
	case "LIKE":
		return there && like(have, c.value)
	}
	return there && like(strings.ToLower(have), strings.ToLower(c.value))
}

func (c *clause) holdsNumber(have int64) bool {
	want, err := strconv.ParseInt(c.value, 10, 64)
	if err != nil {
		return false // parseFilter has refused it
	}
	switch c.op {
	case "=":
		return have == want
	case "!=":
		return have != want
	case "<":
		return have < want
	case "<=":
		return have <= want
	case ">":
		return have > want
	}
	return have >= want
}

// like matches SQL's pattern: % is any text, _ any one character. Linear in text times the
// number of %, without recursion.
func like(text, pattern string) bool {
	t, p := []rune(text), []rune(pattern)
	i, j, star, mark := 0, 0, -1, 0
	for i < len(t) {
		switch {
		case j < len(p) && p[j] == '%':
			star, mark = j, i
			j++
		case j < len(p) && (p[j] == '_' || p[j] == t[i]):
			i, j = i+1, j+1
		case star >= 0:
			mark++
			i, j = mark, star+1
		default:
			return false
		}
	}
	for j < len(p) && p[j] == '%' {
		j++
	}
	return j == len(p)
}

// order reads "name ASC"; by compares one field, desc turns it around.
type order[T any] map[string]func(a, b T) int

func (o order[T]) compare(by []string) (func(a, b T) int, error) {
	var steps []func(a, b T) int
	for _, text := range by {
		words := strings.Fields(text)
		var f func(a, b T) int
		if len(words) == 1 || len(words) == 2 {
			f = o[strings.ToLower(words[0])]
		}
		if f == nil || len(words) == 2 && !strings.EqualFold(words[1], "ASC") && !strings.EqualFold(words[1], "DESC") {
			names := make([]string, 0, len(o))
			for name := range o {
				names = append(names, name)
			}
			slices.Sort(names)
			return nil, outrigger.Errorf(outrigger.Invalid, "order_by %q is not one of %s, with ASC or DESC", text, strings.Join(names, ", "))
		}
		if len(words) == 2 && strings.EqualFold(words[1], "DESC") {
			up := f
			f = func(a, b T) int { return up(b, a) }
		}
		steps = append(steps, f)
	}
	return func(a, b T) int {
		for _, f := range steps {
			if d := f(a, b); d != 0 {
				return d
			}
		}
		return 0
	}, nil
}

// page cuts one page out of what was found.
func page[T any](c *call, all []T, usual, most int) (part []T, next string, err error) {
	n := usual
	if c.in.maxResults != "" {
		if n, err = strconv.Atoi(c.in.maxResults); err != nil || n < 1 || n > most {
			return nil, "", outrigger.Errorf(outrigger.Invalid, "max_results is %q, allowed is 1..%d", c.in.maxResults, most)
		}
	}
	from := 0
	if c.in.pageToken != "" {
		raw, err := base64.RawURLEncoding.DecodeString(c.in.pageToken)
		if err == nil {
			from, err = strconv.Atoi(string(raw))
		}
		if err != nil || from < 0 {
			return nil, "", outrigger.Errorf(outrigger.Invalid, "page_token %q is not one that was given out", c.in.pageToken)
		}
	}
	from = min(from, len(all))
	to := min(from+n, len(all))
	if to < len(all) {
		next = base64.RawURLEncoding.EncodeToString([]byte(strconv.Itoa(to)))
	}
	return all[from:to], next, nil
}

// models are all that the caller may see.
func (c *call) models(verb string) (all []*pb.Model, err error) {
	if c.h.o.Gate != nil {
		_, done, err := c.h.o.Gate(c.ctx, verb)
		if done != nil {
			done(err)
		}
		if err != nil {
			return nil, err
		}
	}
	return c.h.o.All(), nil
}

func searchModels(c *call) (any, error) {
	clauses, err := parseFilter(c.in.filter, []string{"name"}, nil)
	if err != nil {
		return nil, err
	}
	by := order[*pb.Model]{
		"name": func(a, b *pb.Model) int { return cmp.Compare(a.GetName(), b.GetName()) },
		"creation_timestamp": func(a, b *pb.Model) int {
			return a.GetCreatedAt().AsTime().Compare(b.GetCreatedAt().AsTime())
		},
		"last_updated_timestamp": func(a, b *pb.Model) int {
			return a.GetChangedAt().AsTime().Compare(b.GetChangedAt().AsTime())
		},
	}
	by["timestamp"] = by["last_updated_timestamp"]
	compare, err := by.compare(append(slices.Clone(c.in.orderBy), "name"))
	if err != nil {
		return nil, err
	}
	all, err := c.models("ListModels")
	if err != nil {
		return nil, err
	}
	var found []*pb.Model
	for _, m := range all {
		if !slices.ContainsFunc(clauses, func(c clause) bool {
			if c.field == "tags" {
				v, ok := m.GetTags()[c.tag]
				return !c.holds(v, ok)
			}
			return !c.holds(m.GetName(), true)
		}) {
			found = append(found, m)
		}
	}
	slices.SortStableFunc(found, compare)
	part, next, err := page(c, found, defaultModels, mostModels)
	if err != nil {
		return nil, err
	}
	out := struct {
		Models []registeredModel `json:"registered_models,omitempty"`
		Next   string            `json:"next_page_token,omitempty"`
	}{Next: next}
	for _, m := range part {
		out.Models = append(out.Models, modelOf(m))
	}
	return out, nil
}

func searchVersions(c *call) (any, error) {
	clauses, err := parseFilter(c.in.filter, []string{"name", "run_id", "source_path"}, []string{"version_number"})
	if err != nil {
		return nil, err
	}
	by := order[modelVersion]{
		"name":                   func(a, b modelVersion) int { return cmp.Compare(a.Name, b.Name) },
		"version_number":         func(a, b modelVersion) int { return cmp.Compare(a.number, b.number) },
		"creation_timestamp":     func(a, b modelVersion) int { return cmp.Compare(a.Created, b.Created) },
		"last_updated_timestamp": func(a, b modelVersion) int { return cmp.Compare(a.Updated, b.Updated) },
	}
	usual := c.in.orderBy
	if len(usual) == 0 {
		usual = []string{"last_updated_timestamp DESC"}
	}
	compare, err := by.compare(append(slices.Clone(usual), "name", "version_number DESC"))
	if err != nil {
		return nil, err
	}
	all, err := c.models("ListModels")
	if err != nil {
		return nil, err
	}
	found := []modelVersion{}
	for _, m := range all {
		for _, pv := range m.GetVersions() {
			if v := versionOf(m, pv); v.matches(clauses) {
				found = append(found, v)
			}
		}
	}
	slices.SortStableFunc(found, compare)
	part, next, err := page(c, found, defaultVersions, mostVersions)
	if err != nil {
		return nil, err
	}
	return struct {
		Versions []modelVersion `json:"model_versions,omitempty"`
		Next     string         `json:"next_page_token,omitempty"`
	}{part, next}, nil
}

func (v *modelVersion) matches(clauses []clause) bool {
	for _, c := range clauses {
		ok := false
		switch c.field {
		case "name":
			ok = c.holds(v.Name, true)
		case "run_id":
			ok = c.holds(v.RunID, v.RunID != "")
		case "source_path":
			ok = c.holds(v.Source, v.Source != "")
		case "version_number":
			ok = c.holdsNumber(int64(v.number))
		case "tags":
			i := slices.IndexFunc(v.Tags, func(t keyText) bool { return t.Key == c.tag })
			ok = i >= 0 && c.holds(v.Tags[i].Value, true)
		}
		if !ok {
			return false
		}
	}
	return true
}
