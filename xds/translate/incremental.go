package translate

import (
	"iter"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	lua "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	runtime "github.com/envoyproxy/go-control-plane/envoy/service/runtime/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Encoder encodes one policy after the other for one kind of client and writes only what
// belongs to models that changed; the rest of a set is the messages of the set before.
//
// For every sequence of changes the last set equals, byte for byte, what EncodeFor makes
// of the last policy. An Encoder is not safe for concurrent use; the sets it returns are
// as safe as any. After an error it must not be used any more.
type Encoder struct {
	kind   Kind
	opt    Options
	last   *Resources
	models map[string]*encoded
	sorted []string       // names of models
	named  map[string]int // how often models name a secret, by its resource name
}

// encoded is what remains of one model.
type encoded struct {
	keys []Key
	// Its parts of what all models of an Envoy share.
	assign string
	kills  []kill
	lease  time.Duration // policy.Model.DeadMan
	// secrets it names.
	secrets []string
}

// Change is how a policy differs from the one before. The first one given to an Encoder
// holds everything.
type Change struct {
	Position uint64
	Regions  []policy.Region // all of them, by name
	Models   []ModelChange   // new or changed
	Removed  []string        // names of models that are no longer there
	Secrets  Secrets         // all of them; those that models name go into the set
}

// ModelChange is a model as it is now: normalised, valid, and not modified afterwards.
type ModelChange struct {
	Model *policy.Model
	// ChangedAt is as in Options.ChangedAt, which Encoders do not read.
	ChangedAt uint64
}

// NewEncoder returns an Encoder that has encoded nothing yet. kind is one of Kinds.
func NewEncoder(kind Kind, opt Options) *Encoder {
	if opt.ConnectTimeout <= 0 {
		opt.ConnectTimeout = connectTimeout
	}
	return &Encoder{kind: kind, opt: opt, models: make(map[string]*encoded), named: make(map[string]int)}
}

// Encode returns the set after the change: a fork of the set it returned before. Errors
// have kind Invalid.
func (e *Encoder) Encode(c Change) (*Resources, error) {
	first := e.last == nil
	if first {
		e.last = new(Resources)
	}
	res := e.last.Fork()
	w := &encoder{kind: e.kind, opt: e.opt, res: res}
	shared := first // what all models of an Envoy share has to be written anew
	for _, name := range c.Removed {
		shared = e.remove(res, name) || shared
	}
	for _, m := range c.Models {
		differs, err := e.model(res, m)
		if err != nil {
			return nil, err
		}
		shared = shared || differs
	}
	if e.kind == KindEnvoy {
		if first {
			if err := w.envoyBase(); err != nil {
				return nil, err
			}
		}
		if shared {
			if err := e.shared(res); err != nil {
				return nil, err
			}
		}
	}
	e.secrets(res, c.Secrets)
	res.Put(xds.TypeMeshPolicy, xds.MeshName, encodeMesh(c.Position, c.Regions))
	if err := res.validateTouched(); err != nil {
		return nil, err
	}
	e.last = res
	return res, nil
}

// remove takes a model out of res and reports whether it was there.
func (e *Encoder) remove(res *Resources, name string) bool {
	old := e.models[name]
	if old == nil {
		return false
	}
	for _, k := range old.keys {
		res.Delete(k.TypeURL, k.Name)
	}
	delete(e.models, name)
	e.names(old, -1)
	i, _ := slices.BinarySearch(e.sorted, name)
	e.sorted = slices.Delete(e.sorted, i, i+1)
	return true
}

// model writes one model into res and reports whether its parts of what is shared differ
// from before.
func (e *Encoder) model(res *Resources, c ModelChange) (differs bool, err error) {
	own := new(Resources).Fork() // apart, to know which resources are the model's
	w := &encoder{kind: e.kind, opt: e.opt, res: own}
	if err := w.model(c.Model, c.ChangedAt); err != nil {
		return false, err
	}
	next := &encoded{keys: own.sortedTouched(), secrets: SecretNames(c.Model)}
	if e.kind == KindEnvoy {
		next.assign, next.kills, next.lease = assignEntry(c.Model), kills(c.Model), c.Model.DeadMan
	}
	old := e.models[c.Model.Name]
	if old == nil {
		i, _ := slices.BinarySearch(e.sorted, c.Model.Name)
		e.sorted = slices.Insert(e.sorted, i, c.Model.Name)
	} else {
		for _, k := range old.keys {
			if own.byType[k.TypeURL][k.Name] == nil {
				res.Delete(k.TypeURL, k.Name)
			}
		}
	}
	for _, k := range next.keys {
		res.Put(k.TypeURL, k.Name, own.Get(k.TypeURL, k.Name))
	}
	e.models[c.Model.Name] = next
	e.names(old, -1)
	e.names(next, 1)
	return old == nil || old.assign != next.assign || old.lease != next.lease || !slices.Equal(old.kills, next.kills), nil
}

// shared writes what all models of an Envoy have part in: the bucket rule and the kill
// switches.
func (e *Encoder) shared(res *Resources) error {
	script := assignScript(e.each(func(m *encoded) string { return m.assign }))
	assign, err := pack(&lua.Lua{DefaultSourceCode: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: script}}})
	if err != nil {
		return errEncode(assignFilter, err)
	}
	res.Put(xds.TypeExtension, assignFilter, &core.TypedExtensionConfig{Name: assignFilter, TypedConfig: assign})
	e.runtime(res)
	return nil
}

// runtime writes the kill switches, and over them, for as long as the lease runs, the
// candidates. A version that is out is written out in both layers, because Envoys may keep
// the last value of a key that goes away.
func (e *Encoder) runtime(res *Resources) {
	base, leased := make(map[string]*structpb.Value), make(map[string]*structpb.Value)
	ttl := time.Duration(0)
	for _, m := range e.models {
		if m.lease > 0 && (ttl == 0 || m.lease < ttl) {
			ttl = m.lease
		}
		for _, k := range m.kills {
			share := structpb.NewNumberValue(float64(k.serves))
			base[k.key] = share
			if k.leased || k.serves == 0 {
				base[k.key], leased[k.key] = structpb.NewNumberValue(0), share
			}
		}
	}
	res.Put(xds.TypeRuntime, xds.RuntimeName, &runtime.Runtime{Name: xds.RuntimeName, Layer: &structpb.Struct{Fields: base}})
	over := &runtime.Runtime{Name: xds.LeaseName, Layer: &structpb.Struct{Fields: leased}}
	if ttl == 0 {
		res.Put(xds.TypeRuntime, xds.LeaseName, over)
		return
	}
	// The way to the Envoy and its timer are within the lease, too.
	res.PutLeased(xds.TypeRuntime, xds.LeaseName, over, ttl-ttl/20)
}

// each yields something of every model, by name.
func (e *Encoder) each(part func(*encoded) string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, name := range e.sorted {
			if !yield(part(e.models[name])) {
				return
			}
		}
	}
}
