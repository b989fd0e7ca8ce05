package facts

import (
	"slices"
	"strings"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Alert is one raised alert; ResolvedAt is zero while it stands.
type Alert struct {
	ID       string
	Severity string
	Summary  string
	Numbers  map[string]string
	Notify   []string // contacts to tell; empty = as configured
	// RaisedAt is of the last time it was raised, Since of the first since it was resolved.
	RaisedAt, Since time.Time
	ResolvedAt      time.Time
	// SilencedUntil is until when nobody is notified, zero if there is no silence.
	SilencedUntil time.Time
	// Deliveries are the last outcome per route since Since, sorted by route.
	Deliveries []Delivery
}

// Delivery is what became of telling one route about an alert.
type Delivery struct {
	*pb.AlertNotified
	At time.Time
}

// Delivery returns the outcome of a route, or nil.
func (a *Alert) Delivery(route string) *Delivery {
	for i := range a.Deliveries {
		if a.Deliveries[i].GetRoute() == route {
			return &a.Deliveries[i]
		}
	}
	return nil
}

// Alerts returns the remembered alerts, the newest first.
func (f *Facts) Alerts() []*Alert {
	out := slices.Clone(f.alerts)
	slices.Reverse(out)
	return out
}

// Alert returns the alert of that id, or nil.
func (f *Facts) Alert(id string) *Alert {
	for _, a := range f.alerts {
		if a.ID == id {
			return a
		}
	}
	return nil
}

// alertRaised adds an alert, or raises a resolved one again under the same id.
func (d *draft) alertRaised(p *pb.AlertRaised) {
	id, _ := d.subject(AlertPrefix)
	a := &Alert{ID: id, Severity: p.GetSeverity(), Summary: p.GetSummary(), Numbers: p.GetNumbers(), Notify: p.GetNotify(), RaisedAt: d.at(), Since: d.at()}
	kept := make([]*Alert, 0, len(d.alerts)+1)
	for _, old := range d.alerts {
		if old.ID != id {
			kept = append(kept, old)
		} else if old.ResolvedAt.IsZero() {
			// Raised again with newer numbers: a silence holds, and who was told still was.
			a.SilencedUntil, a.Since, a.Deliveries = old.SilencedUntil, old.Since, old.Deliveries
		}
	}
	if len(kept) >= MaxAlerts {
		// Resolved alerts leave first; among equals the oldest.
		i := max(0, slices.IndexFunc(kept, func(a *Alert) bool { return !a.ResolvedAt.IsZero() }))
		kept = slices.Delete(kept, i, i+1)
	}
	d.alerts = append(kept, a)
}

func (d *draft) alertResolved() {
	id, _ := d.subject(AlertPrefix)
	i := slices.IndexFunc(d.alerts, func(a *Alert) bool { return a.ID == id })
	if i < 0 || !d.alerts[i].ResolvedAt.IsZero() {
		return
	}
	d.alerts = slices.Clone(d.alerts)
	resolved := *d.alerts[i]
	resolved.ResolvedAt = d.at()
	d.alerts[i] = &resolved
}

func (d *draft) alertSilenced(p *pb.AlertSilenced) {
	id, _ := d.subject(AlertPrefix)
	i := slices.IndexFunc(d.alerts, func(a *Alert) bool { return a.ID == id })
	if i < 0 {
		return
	}
	d.alerts = slices.Clone(d.alerts)
	silenced := *d.alerts[i]
	silenced.SilencedUntil = wire.Time(p.GetUntil())
	d.alerts[i] = &silenced
}

// alertNotified keeps the last outcome of each route, of MaxDeliveries at most.
func (d *draft) alertNotified(p *pb.AlertNotified) {
	id, _ := d.subject(AlertPrefix)
	i := slices.IndexFunc(d.alerts, func(a *Alert) bool { return a.ID == id })
	if i < 0 {
		return
	}
	told := *d.alerts[i]
	told.Deliveries = slices.DeleteFunc(slices.Clone(told.Deliveries), func(x Delivery) bool { return x.GetRoute() == p.GetRoute() })
	if len(told.Deliveries) >= MaxDeliveries {
		return
	}
	told.Deliveries = append(told.Deliveries, Delivery{p, d.at()})
	slices.SortFunc(told.Deliveries, func(x, y Delivery) int { return strings.Compare(x.GetRoute(), y.GetRoute()) })
	d.alerts = slices.Clone(d.alerts)
	d.alerts[i] = &told
}
