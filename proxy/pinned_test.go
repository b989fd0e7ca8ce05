package proxy

import (
	"context"
	"errors"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
)

type readerFunc func(cache.Request) (cache.Answer, error)

func (f readerFunc) Get(_ context.Context, r cache.Request) (cache.Answer, error) { return f(r) }

// What counts as the present version of a pinned variable, and what does not.
func TestPinnedBy(t *testing.T) {
	at := func(position uint64) *pb.Variable {
		return &pb.Variable{Version: &pb.Version{Dot: &pb.Dot{Region: "eu", Incarnation: 7, Position: position}}}
	}
	seen := map[string]bool{}
	for _, tt := range []struct {
		name    string
		answer  cache.Answer
		err     error
		current bool
	}{
		{"found", cache.Answer{Found: true, Variable: at(1)}, nil, true},
		{"found, written later", cache.Answer{Found: true, Variable: at(2)}, nil, true},
		{"absent", cache.Answer{}, nil, true},
		{"stale", cache.Answer{Found: true, Variable: at(3), Stale: true}, nil, false},
		{"absent as of long ago", cache.Answer{Stale: true}, nil, false},
		{"cannot be read", cache.Answer{}, errors.New("down"), false},
	} {
		var asked outrigger.Key
		got, current := pinnedBy(readerFunc(func(r cache.Request) (cache.Answer, error) {
			asked = r.Key
			return tt.answer, tt.err
		}))(t.Context(), "prompts", "system")
		if asked != (outrigger.Key{Tenant: "default", Session: "prompts", Name: "system"}) || current != tt.current || (got == "") == current || seen[got] && current {
			t.Errorf("%s: %q, current %v; asked for %v", tt.name, got, current, asked)
		}
		seen[got] = true
	}
}
