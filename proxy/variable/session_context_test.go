package variable_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

// sessionContext makes the calls the published Python client makes, in its order, and
// takes the answers as it does: nothing in it knows of the mesh. It has the client's own
// cache of 5 s, which no server can invalidate.
type sessionContext struct {
	w     *world
	id    string
	ttl   time.Duration
	cache map[string]cached
	calls []string
}

type cached struct {
	value *snakepit.Variable
	until time.Time
}

func newSessionContext(w *world, id string) *sessionContext {
	c := &sessionContext{w: w, id: id, ttl: 5 * time.Second, cache: map[string]cached{}}
	in, out := []byte{0x0a, byte(len(id))}, []byte("unset") // the constructor asks for tools
	in = append(in, id...)
	must(w.t, w.conn.Invoke(context.Background(), "/snakepit.bridge.BridgeService/GetExposedElixirTools", &in, &out, grpc.ForceCodecV2(raw{})))
	if len(out) != 0 {
		w.t.Errorf("tools: %q", out)
	}
	return c
}

func (c *sessionContext) note(call string) { c.calls = append(c.calls, call) }

func (c *sessionContext) get(name string) (any, error) {
	v, err := c.fetch(name)
	if err != nil {
		return nil, err
	}
	var out any
	return out, json.Unmarshal(v.Value.Value, &out)
}

func (c *sessionContext) fetch(name string) (*snakepit.Variable, error) {
	if e, ok := c.cache[name]; ok && time.Now().Before(e.until) {
		return e.value, nil
	}
	c.note("Get " + name)
	r, err := c.w.bridge.GetVariable(context.Background(), &snakepit.GetVariableRequest{SessionId: c.id, VariableIdentifier: name})
	if err != nil {
		return nil, err
	}
	c.remember(r.Variable)
	return r.Variable, nil
}

func (c *sessionContext) remember(v *snakepit.Variable) {
	e := cached{v, time.Now().Add(c.ttl)}
	c.cache[v.Name], c.cache[v.Id] = e, e
}

func (c *sessionContext) forget(v *snakepit.Variable) {
	delete(c.cache, v.Name)
	delete(c.cache, v.Id)
}

func encode(kind string, v any) *anypb.Any {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return value(kind, string(b))
}

// update reads, for the type, and then sets.
func (c *sessionContext) update(name string, v any) error {
	old, err := c.fetch(name)
	if err != nil {
		return err
	}
	c.note("Set " + name)
	r, err := c.w.bridge.SetVariable(context.Background(), &snakepit.SetVariableRequest{SessionId: c.id, VariableIdentifier: old.Id,
		Value: encode(old.Type, v), Metadata: map[string]string{"source": "python"}})
	if err != nil {
		return err
	}
	c.forget(old)
	if !r.Success {
		return fmt.Errorf("update refused: %s", r.ErrorMessage)
	}
	return nil
}

// setItem is ctx[name] = v: a text with "not found" makes the client register.
func (c *sessionContext) setItem(name string, v any) error {
	err := c.update(name, v)
	if err == nil || !strings.Contains(strings.ToLower(err.Error()), "not found") {
		return err
	}
	kind := map[bool]string{true: "string", false: "float"}[fmt.Sprintf("%T", v) == "string"]
	c.note("Register " + name)
	r, err := c.w.bridge.RegisterVariable(context.Background(), &snakepit.RegisterVariableRequest{SessionId: c.id, Name: name, Type: kind, InitialValue: encode(kind, v)})
	if err == nil && !r.Success {
		err = fmt.Errorf("register refused: %s", r.ErrorMessage)
	}
	return err
}

// updateMany reads all, then sets all, without atomicity.
func (c *sessionContext) updateMany(values map[string]any) (map[string]string, error) {
	var names []string
	for n := range values {
		names = append(names, n)
	}
	c.note("GetVariables")
	g, err := c.w.bridge.GetVariables(context.Background(), &snakepit.BatchGetVariablesRequest{SessionId: c.id, VariableIdentifiers: names, IncludeMetadata: true})
	if err != nil {
		return nil, err
	}
	if len(g.MissingVariables) > 0 {
		return nil, fmt.Errorf("Variables not found: %v", g.MissingVariables)
	}
	req := &snakepit.BatchSetVariablesRequest{SessionId: c.id, Updates: map[string]*anypb.Any{}}
	for n, v := range g.Variables {
		c.forget(v)
		req.Updates[n] = encode(v.Type, values[n])
	}
	c.note("SetVariables")
	r, err := c.w.bridge.SetVariables(context.Background(), req)
	if err != nil {
		return nil, err
	}
	return r.Errors, nil
}

// The client's whole life without a session of its own making.
func TestSessionContextPattern(t *testing.T) {
	inWorld(t, worldOptions{autoCreate: true}, func(t *testing.T, w *world) {
		a, b := newSessionContext(w, "job"), newSessionContext(w, "job")
		must(t, a.setItem("temperature", 0.7)) // nobody has registered it
		must(t, a.setItem("temperature", 0.8))
		if v, err := a.get("temperature"); err != nil || v != 0.8 {
			t.Errorf("temperature %v, %v", v, err)
		}
		must(t, a.setItem("prompt", "be brief"))
		if v, err := b.get("prompt"); err != nil || v != "be brief" {
			t.Errorf("prompt %v, %v", v, err)
		}
		if errs, err := a.updateMany(map[string]any{"temperature": 0.5, "prompt": "be long"}); err != nil || len(errs) != 0 {
			t.Errorf("batch: %v, %v", errs, err)
		}
		if _, err := a.updateMany(map[string]any{"temperature": 0.5, "top_p": 1.0}); err == nil || !strings.Contains(err.Error(), "not found") {
			t.Errorf("batch with an unknown name: %v", err)
		}
		if err := a.update("top_p", 1.0); gstatus.Code(err) != codes.NotFound {
			t.Errorf("unknown name: %v", err)
		}
		want := "Get temperature|Register temperature|Get temperature|Set temperature|Get temperature|Get prompt|Register prompt|GetVariables|SetVariables|GetVariables|Get top_p"
		if got := strings.Join(a.calls, "|"); got != want {
			t.Errorf("the client made the calls\n%s, want\n%s", got, want)
		}
		// What one client writes another sees at once, unless it has its own copy: then after
		// the client's five seconds, whatever the mesh does.
		if v, _ := b.get("temperature"); v != 0.5 {
			t.Errorf("the other client reads %v", v)
		}
		must(t, a.update("temperature", 0.6))
		if v, _ := b.get("temperature"); v != 0.5 {
			t.Errorf("the client's own cache was bypassed: %v", v)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if v, _ := b.get("temperature"); v != 0.6 {
			t.Errorf("after the client's TTL: %v", v)
		}
		b.ttl = 0
		for i := range 20 {
			must(t, a.update("temperature", float64(i)))
			delete(b.cache, "temperature")
			if v, _ := b.get("temperature"); v != float64(i) {
				t.Errorf("write %d: the other client reads %v", i, v)
			}
		}
	})
}

// Clients that race to register one name: one succeeds, nobody is told nonsense, and the
// value is one of theirs. Increments by read and set lose updates, which is the client's
// semantics; with expected_version none are lost.
func TestConcurrentClients(t *testing.T) {
	inWorld(t, worldOptions{autoCreate: true}, func(t *testing.T, w *world) {
		const clients, increments = 8, 25
		var all sync.WaitGroup
		won := make([]bool, clients)
		for i := range clients {
			all.Go(func() {
				_, err := w.bridge.RegisterVariable(context.Background(), &snakepit.RegisterVariableRequest{SessionId: "s", Name: "n", Type: "integer", InitialValue: value("integer", "0")})
				if won[i] = err == nil; err != nil && gstatus.Code(err) != codes.AlreadyExists {
					t.Errorf("client %d: %v", i, err)
				}
			})
		}
		all.Wait()
		n := 0
		for _, x := range won {
			if x {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d clients registered the variable", n)
		}
		for range clients {
			all.Go(func() {
				for done := 0; done < increments; {
					v, err := w.bridge.GetVariable(context.Background(), getReq("n"))
					if err != nil {
						t.Error(err)
						return
					}
					var x int
					if err := json.Unmarshal(v.Variable.Value.Value, &x); err != nil {
						t.Error(err)
						return
					}
					r, err := w.bridge.SetVariable(context.Background(), &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: "n",
						Value: value("integer", fmt.Sprint(x+1)), Metadata: map[string]string{"expected_version": fmt.Sprint(v.Variable.Version)}})
					if err != nil {
						t.Error(err)
						return
					}
					if r.Success {
						done++
					}
				}
			})
		}
		all.Wait()
		w.holds("n", fmt.Sprint(clients*increments), clients*increments)
	})
}
