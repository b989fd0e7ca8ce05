package variables

import "strings"

// matchGlob reports whether name matches pattern as a whole. "*" stands for any run of
// characters, every other byte for itself; the empty pattern matches every name. It
// looks at each byte of name at most once per literal between stars and never
// backtracks over an earlier star, because the leftmost fit of a literal is always the
// best one: the time is bounded by the library's substring search, which is linear.
func matchGlob(pattern, name string) bool {
	if pattern == "" {
		return true
	}
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == name
	}
	name, ok := strings.CutPrefix(name, head)
	if !ok {
		return false
	}
	for {
		literal, after, more := strings.Cut(rest, "*")
		if !more { // the last literal is anchored at the end
			return strings.HasSuffix(name, literal)
		}
		i := strings.Index(name, literal)
		if i < 0 {
			return false
		}
		name, rest = name[i+len(literal):], after
	}
}
