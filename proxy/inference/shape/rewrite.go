package shape

import "encoding/json"

// Parts is a body in three pieces: before the model's name, the name, after it. The first
// and the last are the original's memory, so an 8 MiB prompt costs nothing here.
type Parts [3][]byte

// Size is the length of the whole in bytes.
func (p Parts) Size() int64 { return int64(len(p[0]) + len(p[1]) + len(p[2])) }

// Rewrite replaces the model's string token in body, from which e was scanned, by name;
// an empty or equal name, or a body without one, leaves the body as it is.
func (e *Envelope) Rewrite(body []byte, name string) Parts {
	if name == "" || e.ModelEnd == 0 || name == e.Model {
		return Parts{body, nil, nil}
	}
	quoted := quote(name)
	return Parts{body[:e.ModelStart], quoted, body[e.ModelEnd:]}
}

// quote returns name as a JSON string.
func quote(name string) []byte {
	for _, c := range []byte(name) {
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			quoted, _ := json.Marshal(name) // a string always marshals
			return quoted
		}
	}
	return append(append(append(make([]byte, 0, len(name)+2), '"'), name...), '"')
}

// RewriteBody is Rewrite for a route: where the path names the model, the name in the
// body follows it if it is the same name (Azure's clients send both, Gemini's write
// "models/" before it), and is left alone if it is another.
func (r *Route) RewriteBody(body []byte, e *Envelope, upstream string) Parts {
	switch {
	case upstream == "" || r.Model == "" || e.Model == r.Model && r.API.Family != OIP:
		return e.Rewrite(body, upstream)
	case r.API.Family == Gemini && e.Model == "models/"+r.Model:
		return e.Rewrite(body, "models/"+upstream)
	}
	return Parts{body, nil, nil}
}

// Template is path, from which r was matched, with the model's name, and the version's
// where there is one, replaced by a placeholder: a name for the route that callers cannot
// vary.
func (r *Route) Template(path string) string {
	if r.Model == "" {
		return path
	}
	return r.prefix + "{model}" + r.suffix
}
