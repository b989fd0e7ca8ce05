package node

import (
	"testing"

	"github.com/DataDog/sketches-go/ddsketch"
	"github.com/DataDog/sketches-go/ddsketch/pb/sketchpb"
	"github.com/DataDog/sketches-go/ddsketch/store"
	"google.golang.org/protobuf/proto"
)

// A report carries the lag since the last one, in milliseconds, and nothing twice.
func TestCacheDelta(t *testing.T) {
	l, err := newLagSketch()
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{lag: l}
	if d := a.CacheDelta(); d != nil {
		t.Fatalf("an agent that saw nothing reports %v", d)
	}
	l.add(0.002)
	l.add(0.004)
	d := a.CacheDelta()
	var msg sketchpb.DDSketch
	if err := proto.Unmarshal(d.GetInvalidationLagSketch(), &msg); err != nil {
		t.Fatal(err)
	}
	s, err := ddsketch.FromProtoWithStoreProvider(&msg, store.DefaultProvider)
	if err != nil {
		t.Fatal(err)
	}
	top, err := s.GetValueAtQuantile(1)
	if err != nil || s.GetCount() != 2 || top < 3.9 || top > 4.1 {
		t.Fatalf("count %v, maximum %v ms, %v", s.GetCount(), top, err)
	}
	if d := a.CacheDelta(); d != nil {
		t.Fatalf("the same lag is reported twice: %v", d)
	}
	if n := l.copy().GetCount(); n != 2 {
		t.Fatalf("the agent's own statistics lost values: %v", n)
	}
}
