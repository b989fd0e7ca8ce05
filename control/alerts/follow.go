package alerts

import (
	"context"
	"reflect"
	"slices"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// rereadEvery is how often the routes are read again.
const rereadEvery = 2 * time.Second

// routesAlert is the alert about routes that cannot be read.
const routesAlert = "alert-routes"

// follow reads the routes again until ctx ends. What cannot be read changes nothing about
// those in force and is an alert, which they carry; it is over with the next that can.
func (s *Service) follow(ctx context.Context) error {
	tick := time.NewTicker(rereadEvery)
	defer tick.Stop()
	fault := "" // as it was told last
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		routes, err := s.opts.Reread()
		if err == nil {
			err = checkRoutes(routes)
		}
		if err == nil {
			fault = ""
			s.routesRead(ctx) // first: new routes need not hear of it
			s.adoptRoutes(routes)
			continue
		}
		if err.Error() == fault {
			continue
		}
		s.opts.Logger.Error("alert routes cannot be used; those read before stay", "error", err)
		raised := &pb.AlertRaised{Severity: "high", Summary: "the file of alert routes cannot be used, those read before stay: " + err.Error()}
		if err := s.append(ctx, routesAlert, &pb.Event{Payload: &pb.Event_AlertRaised{AlertRaised: raised}}); err != nil {
			s.opts.Logger.Warn("alert not raised; retrying", "alert", routesAlert, "error", err)
			continue
		}
		fault = err.Error()
	}
}

// routesRead ends the alert, also one of a life before.
func (s *Service) routesRead(ctx context.Context) {
	if a := s.opts.Facts.Facts().Alert(routesAlert); a == nil || !a.ResolvedAt.IsZero() {
		return
	}
	if err := s.append(ctx, routesAlert, &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: "the routes were read"}}}); err != nil {
		s.opts.Logger.Warn("alert not resolved; retrying", "alert", routesAlert, "error", err)
	}
}

// adoptRoutes puts routes in force if they are other ones.
func (s *Service) adoptRoutes(routes []Route) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.EqualFunc(routes, s.routes, sameRoute) {
		return
	}
	s.routes = slices.Clone(routes)
	names := make([]string, len(routes))
	for i := range routes {
		names[i] = routes[i].String()
	}
	s.opts.Logger.Info("alert routes in force", "routes", names)
}

func sameRoute(a, b Route) bool { return reflect.DeepEqual(a, b) }

// repave brings the roads in line with the routes in force. One that did not change goes on
// as it fares; for one that did, failures of its old form are forgotten, and what it was
// told is not told again.
func (s *Service) repave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.EqualFunc(s.roads, s.routes, func(r *road, to Route) bool { return sameRoute(*r.Route, to) }) {
		return
	}
	was := s.roads
	s.roads = make([]*road, 0, len(s.routes))
	for i := range s.routes {
		to := s.routes[i]
		if j := slices.IndexFunc(was, func(r *road) bool { return sameRoute(*r.Route, to) }); j >= 0 {
			s.roads = append(s.roads, was[j])
			continue
		}
		s.roads = append(s.roads, &road{Route: &to})
		for t, x := range s.tries {
			if t.route == to.Name && !x.settled {
				x.attempts = 0
				s.tries[t] = x
			}
		}
	}
}
