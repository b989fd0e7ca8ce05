package inference

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// planEvery is how often a policy nobody asks under is looked at.
const planEvery = time.Second

// RunAnswers shares answers with the node's other pods until ctx ends. It also looks at
// policies under which nothing was asked, so that the answers of a version that was out for
// planEvery are not found when it comes back, whether or not anybody called meanwhile.
func (h *Handler) RunAnswers(ctx context.Context) error {
	if h.o.Answers == nil {
		<-ctx.Done()
		return nil
	}
	ended := make(chan error, 1)
	go func() { ended <- h.o.NodeAnswers.Run(ctx) }()
	t := time.NewTicker(planEvery)
	defer t.Stop()
	for {
		select {
		case err := <-ended:
			return err
		case <-t.C:
			if p, _ := h.policy(); p != nil {
				h.planFor(p)
			}
		}
	}
}

func (h *Handler) policy() (*policy.Policy, PolicyStatus) {
	if h.o.Policy == nil {
		return nil, PolicyStatus{}
	}
	return h.o.Policy()
}

// join asks what the node's other pods know, or are asking.
func (c *call) join(keys answers.Keys, control answers.Control, now time.Time) (*answers.Answer, *answers.Seat) {
	ctx, release := c.base()
	defer release()
	return c.h.o.NodeAnswers.Join(ctx, keys.Node, stretchOf(c.assign.Model, c.assign.Version), now, control.MaxAge)
}

// readAlong answers with what another pod is answered, to this process's readers of f too.
// It returns false, with nothing sent, if that is lost before the answer began or, where it
// is no stream, before it was whole.
func (c *call) readAlong(f *answers.Flight, seat *answers.Seat) bool {
	defer seat.Close()
	base, release := c.base()
	defer release()
	ctx, cancel := context.WithTimeout(base, c.patience())
	defer cancel()
	defer context.AfterFunc(ctx, seat.Close)()
	flush := http.NewResponseController(c.w)
	var header http.Header
	var body []byte // of an answer that is no stream
	for {
		p, err := seat.Next()
		switch {
		case err != nil && header != nil && c.streams:
			f.Fail()
			c.cutShort()
			return true
		case err != nil && c.gone():
			return true
		case err != nil && ctx.Err() != nil:
			c.tooLate()
			return true
		case err != nil, header == nil && p.Header == nil, len(body)+len(p.Body) > answers.MaxAnswer:
			return false
		case p.Header != nil:
			if header = p.Header; c.streams {
				c.begin(header, "joined", tierNode)
				c.w.WriteHeader(http.StatusOK)
			}
		case !c.streams:
			body = append(body, p.Body...)
		case len(p.Body) > 0:
			if _, werr := c.w.Write(p.Body); werr != nil { // and nobody else reads it
				return true
			}
		}
		if p.Whole {
			if !c.streams {
				c.passWhole(header, body, tierNode)
			}
			f.Finish(c.h.now(), p.TTL)
			return true
		}
		if c.streams {
			if ferr := flush.Flush(); ferr != nil && !errors.Is(ferr, http.ErrNotSupported) {
				return true
			}
		}
	}
}

// offer gives an answer to the node's other pods, unless its version has changed by the
// time it leaves.
func (h *Handler) offer(c *call, seat *answers.Seat, key answers.Key, a *answers.Answer, now time.Time) {
	if h.o.NodeAnswers == nil {
		return
	}
	m, v, generation := c.assign.Model.Name, c.assign.Version.Name, c.model.versions[c.assign.Version].generation
	stretch := stretchOf(c.assign.Model, c.assign.Version)
	continues := func() bool { return h.goesOn(m, v, generation, stretch) }
	if seat.Leads() {
		seat.Land(a, now, continues)
		return
	}
	h.o.NodeAnswers.Put(key, stretch, a, now, continues)
}

// goesOn says whether a version is, by the present policy, in the stretch of its life it was in.
func (h *Handler) goesOn(model, version string, generation uint64, stretch answers.Stretch) bool {
	p, _ := h.policy()
	if p == nil {
		return false
	}
	m := p.Model(model)
	if m == nil {
		return false
	}
	v := m.Version(version)
	return v != nil && !v.Quarantined && stretchOf(m, v) == stretch && h.planFor(p).models[m].versions[v].generation == generation
}

// endStretches tells the node which stretches are over between two plans: of versions that
// are gone, quarantined or somewhere else.
func (h *Handler) endStretches(old, next *plan) {
	if h.o.NodeAnswers == nil {
		return
	}
	var over []answers.Stretch
	if old != nil {
		each(old, func(m *policy.Model, v *policy.Version, was *versionPlan) {
			if is := next.version(m.Name, v.Name); !v.Quarantined && (is == nil || is.generation != was.generation) {
				over = append(over, stretchOf(m, v))
			}
		})
	}
	// Also one that this process never saw serve: others may have.
	each(next, func(m *policy.Model, v *policy.Version, _ *versionPlan) {
		if v.Quarantined && !old.endedAt(m, v) {
			over = append(over, stretchOf(m, v))
		}
	})
	h.o.NodeAnswers.End(over...)
}

func each(p *plan, do func(*policy.Model, *policy.Version, *versionPlan)) {
	for i := range p.policy.Models {
		m := &p.policy.Models[i]
		for j := range m.Versions {
			do(m, &m.Versions[j], p.models[m].versions[&m.Versions[j]])
		}
	}
}

// endedAt says whether the plan had the version out in the same stretch already.
func (p *plan) endedAt(m *policy.Model, v *policy.Version) bool {
	if p == nil {
		return false
	}
	was := p.policy.Model(m.Name)
	if was == nil {
		return false
	}
	wasVersion := was.Version(v.Name)
	return wasVersion != nil && wasVersion.Quarantined && stretchOf(was, wasVersion) == stretchOf(m, v)
}

// version is what the plan has of a version, nil if it has none.
func (p *plan) version(model, version string) *versionPlan {
	m := p.policy.Model(model)
	if m == nil {
		return nil
	}
	v := m.Version(version)
	if v == nil {
		return nil
	}
	return p.models[m].versions[v]
}
