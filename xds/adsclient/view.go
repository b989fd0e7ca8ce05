package adsclient

import (
	"errors"
	"maps"
	"slices"
	"strings"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// view is a set of resources as a server sent it: decoded, with the raw form and
// version of each. It has one owner; a view that was handed to the saver or kept as
// Client.good is not changed any more.
type view struct {
	res translate.Resources
	raw map[key]*discovery.Resource
	// broken holds resources that could not even be decoded, by reason. They are not in
	// res, where an older state of them may remain, but they spoil their model.
	broken map[key]error
}

type key struct{ typeURL, name string }

func newView() *view {
	return &view{raw: make(map[key]*discovery.Resource), broken: make(map[key]error)}
}

func (v *view) clone() *view {
	return &view{res: *v.res.Clone(), raw: maps.Clone(v.raw), broken: maps.Clone(v.broken)}
}

// put takes in one resource. It reports whether anything changed.
func (v *view) put(typeURL string, r *discovery.Resource) (changed bool, err error) {
	k := key{typeURL, r.GetName()}
	m, err := translate.Unmarshal(typeURL, k.name, r.GetResource().GetValue())
	if got := r.GetResource().GetTypeUrl(); err == nil && got != typeURL {
		err = &translate.ResourceError{TypeURL: typeURL, Name: k.name, Reason: "comes as " + got}
	}
	if err != nil {
		v.broken[k] = err
		return true, err
	}
	if old := v.raw[k]; old != nil && old.GetVersion() == r.GetVersion() && v.broken[k] == nil {
		return false, nil
	}
	delete(v.broken, k)
	v.raw[k] = r
	v.res.Put(typeURL, k.name, m)
	return true, nil
}

func (v *view) remove(typeURL, name string) {
	k := key{typeURL, name}
	delete(v.broken, k)
	delete(v.raw, k)
	v.res.Delete(typeURL, name)
}

// versions lists what is held of one type, for initial_resource_versions.
func (v *view) versions(typeURL string) map[string]string {
	out := make(map[string]string)
	for k, r := range v.raw {
		if k.typeURL == typeURL {
			out[k.name] = r.GetVersion()
		}
	}
	return out
}

// assembly is the outcome of putting a view together.
type assembly struct {
	policy *policy.Policy // nil if the mesh part is unusable
	good   *view          // what policy was made of
	// failed is why models (or the mesh, under "") keep their previous state.
	failed map[string]error
}

// assemble decodes a view into a policy. Models that are not dirty are taken over from
// prev (they were decoded from the same resources); models that fail keep what prev and
// good have of them. It is a pure function and modifies none of its arguments.
func assemble(v *view, prev *policy.Policy, good *view, dirty func(model string) bool) assembly {
	out := assembly{failed: make(map[string]error), good: &view{raw: make(map[key]*discovery.Resource), broken: make(map[key]error)}}
	if prev == nil {
		prev = &policy.Policy{}
	}
	p, err := translate.DecodeMesh(&v.res)
	if brokenMesh := v.broken[key{xds.TypeMeshPolicy, xds.MeshName}]; brokenMesh != nil {
		err = brokenMesh
	}
	if err != nil {
		out.failed[""] = err
		return out
	}
	spoiled := v.spoiled()
	for _, name := range v.modelNames() {
		old := prev.Model(name)
		if old != nil && !dirty(name) {
			p.Models = append(p.Models, *old)
			continue
		}
		m, err := translate.DecodeModel(&v.res, name)
		if s := spoiled[name]; s != nil {
			err = s
		}
		if err != nil {
			out.failed[name] = err
			if old != nil {
				p.Models = append(p.Models, *old)
			}
			continue
		}
		p.Models = append(p.Models, m)
	}
	out.policy = p
	out.keep(v, func(model string) bool { return out.failed[model] == nil })
	out.keep(good, func(model string) bool { return out.failed[model] != nil })
	return out
}

// keep copies into the good view the resources of from whose model is wanted; those of
// no model (MeshPolicy) belong to "".
func (a *assembly) keep(from *view, wanted func(model string) bool) {
	for k, r := range from.raw {
		model, _ := translate.ModelOf(k.typeURL, k.name)
		if wanted(model) {
			a.good.raw[k] = r
			a.good.res.Put(k.typeURL, k.name, from.res.Get(k.typeURL, k.name))
		}
	}
}

// modelNames lists, sorted, the models that have a ModelPolicy, also a broken one.
func (v *view) modelNames() []string {
	names := v.res.Names(xds.TypeModelPolicy)
	for k := range v.broken {
		if k.typeURL == xds.TypeModelPolicy && v.res.Get(k.typeURL, k.name) == nil {
			names = append(names, k.name)
		}
	}
	slices.Sort(names)
	return names
}

// spoiled maps models to the broken resource that spoils them, the first by type and name.
func (v *view) spoiled() map[string]error {
	out := make(map[string]error)
	for _, k := range slices.SortedFunc(maps.Keys(v.broken), func(a, b key) int {
		return strings.Compare(a.typeURL+" "+a.name, b.typeURL+" "+b.name)
	}) {
		if model, ok := translate.ModelOf(k.typeURL, k.name); ok && out[model] == nil {
			out[model] = v.broken[k]
		}
	}
	return out
}

// missing lists unresolved references, without those only broken resources could
// satisfy: waiting does not help there.
func (v *view) missing() []translate.Ref {
	return slices.DeleteFunc(v.res.Missing(), func(r translate.Ref) bool {
		return v.broken[key{r.TypeURL, r.Name}] != nil
	})
}

// blame returns the resource an error is about, or MeshPolicy.
func blame(err error) key {
	var re *translate.ResourceError
	if errors.As(err, &re) {
		return key{re.TypeURL, re.Name}
	}
	return key{xds.TypeMeshPolicy, xds.MeshName}
}
