package adsserver

import (
	"fmt"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/xds"
)

// Explanation answers, for one resource at one node: is it live, since when, why not.
type Explanation struct {
	Held
	// Push is the push that made the version in force, or, if that is not what the group
	// should have, the one that should have replaced it; "" if it is not remembered.
	Push string
	// Since is when the node accepted the version in force; zero if it has none or that
	// is not known. AtLatest: it may have had it before.
	Since    time.Time
	AtLatest bool
	// Why is one sentence for a person.
	Why string
}

// Explain answers for every type that has, had or is asked for a resource of that name;
// typeURL restricts it to one. The error has kind NotFound if the node is not known. A
// name nobody knows gives one answer, VerdictAbsent.
func (s *Server) Explain(node, typeURL, name string) ([]Explanation, error) {
	l, err := s.line(node)
	if err != nil {
		return nil, err
	}
	if err := l.knowable(); err != nil {
		return nil, err
	}
	_, pushes := s.group(l.Group).snapshot()
	current := s.group(l.Group).wantedBy(l.Decisive())
	var out []Explanation
	for _, t := range xds.Pushed() {
		if typeURL != "" && typeURL != t {
			continue
		}
		v := l.typeOf(t)
		if v == nil {
			v = &typeView{typeURL: t}
		}
		_, asked := v.names[name]
		h := l.held(current, v, name)
		if h.Wanted == "" && h.Version == "" && !asked && !everHad(pushes, t, name) {
			continue
		}
		out = append(out, l.explain(h, pushes))
	}
	if len(out) == 0 {
		h := Held{ResourceID: ResourceID{typeURL, name}, Verdict: VerdictAbsent}
		out = append(out, Explanation{Held: h, Why: fmt.Sprintf("group %s has no resource %q and had none in the %d pushes remembered", l.Group, name, len(pushes))})
	}
	return out, nil
}

func (l *line) typeOf(typeURL string) *typeView {
	for i := range l.types {
		if l.types[i].typeURL == typeURL {
			return &l.types[i]
		}
	}
	return nil
}

// typeOf is nil for a type nobody publishes, and for a nil generation.
func (g *generation) typeOf(typeURL string) *typeState {
	if g == nil {
		return nil
	}
	return g.types[typeURL]
}

func everHad(pushes []pushRecord, typeURL, name string) bool {
	_, ok := changedBy(pushes, typeURL, name, func(change) bool { return true })
	return ok
}

// changedBy finds the newest push with a change of the resource that fits.
func changedBy(pushes []pushRecord, typeURL, name string, fits func(change) bool) (pushRecord, bool) {
	for _, p := range pushes {
		for _, c := range p.changes {
			if c.typeURL == typeURL && c.name == name && fits(c) {
				return p, true
			}
		}
	}
	return pushRecord{}, false
}

func (l *line) explain(h Held, pushes []pushRecord) Explanation {
	x := Explanation{Held: h}
	made, known := changedBy(pushes, h.Type, h.Name, func(c change) bool { return c.after != nil && c.after.version == h.Version })
	if h.Version != "" {
		for _, snd := range l.sends {
			if snd.serial >= made.serial && snd.done != 0 {
				x.Since, x.AtLatest = time.Unix(0, snd.done), snd.join || !known
				break
			}
		}
	}
	cause := made
	if h.Verdict != VerdictLive && h.Verdict != VerdictDisconnected {
		cause, known = changedBy(pushes, h.Type, h.Name, func(change) bool { return true })
	}
	if known {
		x.Push = cause.id
	}
	x.Why = l.why(&x, cause)
	return x
}

func (l *line) why(x *Explanation, cause pushRecord) string {
	keeps := "it has none in force"
	if x.Version != "" {
		keeps = "version " + x.Version + " stays in force"
	}
	switch x.Verdict {
	case VerdictLive:
		return "the node accepted what its group should have"
	case VerdictPending:
		return fmt.Sprintf("sent %s ago and not answered; %s", time.Since(l.sentAt(x.Type)).Round(time.Millisecond), keeps)
	case VerdictWaiting:
		return "not sent: the node has not answered everything of an earlier push; " + keeps
	case VerdictWithheld:
		return "not sent: it holds a private key, and the node's stream is not encrypted and comes from another machine; connect the node over TLS or a Unix socket; " + keeps
	case VerdictRejected:
		blamed := ""
		if n := x.Nack.Resource; n != "" && n != x.Name {
			blamed = ", which seems to be about " + n
		}
		return fmt.Sprintf("rejected%s: %s; %s", blamed, x.Nack.Message, keeps)
	case VerdictRemoving:
		return "its group has it no longer, and the node has not accepted that yet, or cannot be told"
	case VerdictUnsubscribed:
		return fmt.Sprintf("the %s did not ask for it", l.what())
	case VerdictDisconnected:
		return fmt.Sprintf("the node left at %s; %s as far as it said", l.Since.UTC().Format(time.RFC3339), strings.Replace(keeps, "stays", "was", 1))
	}
	if cause.serial != 0 {
		return "removed from its group by push " + cause.id
	}
	return "the node asked for it, and its group has none of that name"
}

func (l *line) what() string {
	if l.Node.Kind == "" {
		return "node"
	}
	return l.Node.Kind
}

func (l *line) sentAt(typeURL string) time.Time {
	if v := l.typeOf(typeURL); v != nil {
		return v.sentAt
	}
	return time.Time{}
}
