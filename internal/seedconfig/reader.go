package seedconfig

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/outrigger-mesh/outrigger"
)

// reader walks the tree; the first error stays and makes the rest a no-op.
type reader struct {
	name string
	err  error
}

// fields says what to do with the value of each key of a mapping.
type fields map[string]func(*yaml.Node)

func (r *reader) fail(n *yaml.Node, format string, args ...any) {
	if r.err == nil {
		r.err = outrigger.Errorf(outrigger.Invalid, "%s:%d:%d: %s", r.name, n.Line, n.Column, fmt.Sprintf(format, args...))
	}
}

// each calls visit for every entry of a mapping, in order.
func (r *reader) each(n *yaml.Node, visit func(key string, at, value *yaml.Node)) {
	switch {
	case n.Kind != yaml.MappingNode:
		r.fail(n, "%s stands where a mapping is expected", shown(n))
		return
	case len(n.Content)/2 > maxEntries:
		r.fail(n, "%d entries; the limit is %d", len(n.Content)/2, maxEntries)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content) && r.err == nil; i += 2 {
		k := n.Content[i]
		if k.Kind != yaml.ScalarNode || k.Value == "" || seen[k.Value] {
			r.fail(k, "key %s is empty, no text or given twice", shown(k))
			return
		}
		seen[k.Value] = true
		visit(k.Value, k, n.Content[i+1])
	}
}

// mapping reads a mapping with known keys.
func (r *reader) mapping(n *yaml.Node, known fields) {
	r.each(n, func(key string, at, value *yaml.Node) {
		read := known[key]
		if read == nil {
			r.fail(at, "key %q is unknown; known are %s", key, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
			return
		}
		read(value)
	})
}

func (r *reader) list(n *yaml.Node, visit func(*yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		r.fail(n, "%s stands where a list is expected", shown(n))
		return
	}
	if len(n.Content) > maxEntries {
		r.fail(n, "%d entries; the limit is %d", len(n.Content), maxEntries)
		return
	}
	for _, c := range n.Content {
		if r.err == nil {
			visit(c)
		}
	}
}

func shown(n *yaml.Node) string {
	switch n.Kind {
	case yaml.ScalarNode:
		return strconv.Quote(n.Value)
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	return "an alias"
}

func (r *reader) text(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Value == "" || n.Tag == "!!null" {
		r.fail(n, "%s stands where a name is expected", shown(n))
	}
	return n.Value
}

func (r *reader) texts(n *yaml.Node) (out []string) {
	r.list(n, func(c *yaml.Node) { out = append(out, r.text(c)) })
	return out
}

func (r *reader) boolean(n *yaml.Node) bool {
	if n.Tag != "!!bool" {
		r.fail(n, "%s stands where true or false is expected", shown(n))
	}
	return strings.EqualFold(n.Value, "true")
}

func (r *reader) number(n *yaml.Node, most float64) float64 {
	v, ok := number(n.Value)
	if n.Kind != yaml.ScalarNode || !ok || v < 0 || v > most {
		r.fail(n, "%s stands where a number from 0 to %v is expected", shown(n), most)
	}
	return v
}

func (r *reader) whole(n *yaml.Node, most float64) uint64 {
	v := r.number(n, most)
	if r.err == nil && v != math.Trunc(v) {
		r.fail(n, "%s stands where a whole number is expected", shown(n))
	}
	return uint64(v)
}

func (r *reader) duration(n *yaml.Node) time.Duration {
	if n.Tag == "!!null" {
		return 0
	}
	d, err := ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		r.fail(n, "%s is not a duration like 5000ms, 24h or 30d, or null for no limit", shown(n))
	}
	return d
}

func (r *reader) quantity(n *yaml.Node) Quantity {
	if v, ok := number(n.Value); ok && n.Kind == yaml.ScalarNode {
		return Quantity{Value: v}
	}
	d := r.duration(n)
	return Quantity{Value: float64(d) / float64(time.Millisecond), Duration: true}
}

func (r *reader) deployment(n *yaml.Node) (f File) {
	r.mapping(n, fields{
		"phases": func(n *yaml.Node) {
			r.each(n, func(name string, _, v *yaml.Node) { f.Phases = append(f.Phases, r.phase(name, v)) })
		},
		"experiments": func(n *yaml.Node) {
			r.each(n, func(name string, _, v *yaml.Node) { f.Experiments = append(f.Experiments, r.experiment(name, v)) })
		},
		"monitoring": func(n *yaml.Node) {
			r.mapping(n, fields{
				"alerts":     func(n *yaml.Node) { f.Alerts = r.alerts(n) },
				"objectives": func(n *yaml.Node) { f.Objectives = r.objectives(n) },
				"dashboards": func(n *yaml.Node) { f.Dashboards = r.texts(n) },
			})
		},
		"rollback": func(n *yaml.Node) { f.Rollback = r.rollback(n) },
	})
	return f
}

func (r *reader) phase(name string, n *yaml.Node) Phase {
	p := Phase{Name: name, At: at(n)}
	r.mapping(n, fields{
		"user_percentage": func(n *yaml.Node) { p.UserPercentage, p.HasPercentage = r.number(n, 100), true },
		"duration":        func(n *yaml.Node) { p.Duration, p.HasDuration = r.duration(n), true },
		"steps": func(n *yaml.Node) {
			r.list(n, func(c *yaml.Node) { p.Steps = append(p.Steps, r.number(c, 100)) })
		},
		"min_requests":     func(n *yaml.Node) { p.MinRequests = r.whole(n, 1<<40) },
		"feature_flags":    func(n *yaml.Node) { p.FeatureFlags = r.texts(n) },
		"monitoring_level": func(n *yaml.Node) { p.MonitoringLevel = r.text(n) },
		"environment":      func(n *yaml.Node) { p.Environment = r.text(n) },
		"rollback_threshold": func(n *yaml.Node) {
			r.each(n, func(metric string, _, v *yaml.Node) {
				p.Rollback = append(p.Rollback, Condition{Metric: metric, Op: ">", Value: r.quantity(v).Value, At: at(v)})
			})
		},
		"gates": func(n *yaml.Node) {
			r.each(n, func(name string, _, v *yaml.Node) { p.Gates = append(p.Gates, r.gate(name, v)) })
		},
		"success_criteria": func(n *yaml.Node) {
			r.each(n, func(metric string, _, v *yaml.Node) {
				op, value, ok := parseComparison(v.Value)
				if v.Kind != yaml.ScalarNode || !ok {
					r.fail(v, "criterion %q is %s; give a comparison with a number, like \"< 0.01\"", metric, shown(v))
				}
				p.Success = append(p.Success, Condition{metric, op, value, at(v)})
			})
		},
	})
	return p
}

func (r *reader) experiment(name string, n *yaml.Node) Experiment {
	e := Experiment{Name: name, Enabled: true}
	r.mapping(n, fields{
		"enabled": func(n *yaml.Node) { e.Enabled = r.boolean(n) },
		"groups": func(n *yaml.Node) {
			r.each(n, func(group string, _, v *yaml.Node) { e.Groups = append(e.Groups, r.group(group, v)) })
		},
		"success_metrics":     func(n *yaml.Node) { e.SuccessMetrics = r.texts(n) },
		"duration":            func(n *yaml.Node) { e.Duration = r.duration(n) },
		"minimum_sample_size": func(n *yaml.Node) { e.MinimumSampleSize = r.whole(n, 1<<40) },
	})
	var sum uint64
	for _, g := range e.Groups {
		sum += uint64(g.Weight)
	}
	if sum == 0 || len(e.Groups) < 2 {
		r.fail(n, "experiment %q has %d groups with weights that sum to %d; it needs two groups and a positive sum", name, len(e.Groups), sum)
	}
	return e
}

func (r *reader) group(name string, n *yaml.Node) Group {
	g := Group{Name: name}
	r.mapping(n, fields{
		"weight": func(n *yaml.Node) { g.Weight = uint32(r.whole(n, 1<<20)) },
		"configuration": func(n *yaml.Node) {
			g.Configuration = map[string]string{}
			r.each(n, func(key string, at, v *yaml.Node) {
				s, err := asJSON(v)
				if err != nil {
					r.fail(at, "configuration %q: %v", key, err)
				}
				g.Configuration[key] = s
			})
		},
	})
	return g
}

func (r *reader) alerts(n *yaml.Node) (out []Alert) {
	r.each(n, func(metric string, _, v *yaml.Node) {
		a := Alert{Metric: metric, At: at(v)}
		r.mapping(v, fields{
			"warning":   func(n *yaml.Node) { a.Warning = r.quantity(n) },
			"critical":  func(n *yaml.Node) { a.Critical = r.quantity(n) },
			"for":       func(n *yaml.Node) { a.For = r.duration(n) },
			"condition": func(n *yaml.Node) { a.Condition = r.text(n) },
			"severity":  func(n *yaml.Node) { a.Severity = r.text(n) },
		})
		out = append(out, a)
	})
	return out
}

func (r *reader) objectives(n *yaml.Node) (out []Objective) {
	r.each(n, func(model string, _, v *yaml.Node) {
		o := Objective{Model: model, At: at(v)}
		r.mapping(v, fields{
			"target": func(n *yaml.Node) { o.Target = r.number(n, 1) },
			"period": func(n *yaml.Node) { o.Period = r.duration(n) },
		})
		out = append(out, o)
	})
	return out
}

func (r *reader) rollback(n *yaml.Node) (b Rollback) {
	r.mapping(n, fields{
		"automatic_triggers": func(n *yaml.Node) {
			r.list(n, func(c *yaml.Node) { b.Triggers = append(b.Triggers, r.trigger(c)) })
		},
		"cooldown":                 func(n *yaml.Node) { b.Cooldown = r.duration(n) },
		"manual_approval_required": func(n *yaml.Node) { b.ManualApprovalRequired = r.boolean(n) },
		"emergency_contacts": func(n *yaml.Node) {
			r.list(n, func(c *yaml.Node) {
				var one Contact
				r.mapping(c, fields{
					"team":   func(n *yaml.Node) { one.Team = r.text(n) },
					"oncall": func(n *yaml.Node) { one.OnCall = r.boolean(n) },
				})
				b.Contacts = append(b.Contacts, one)
			})
		},
	})
	return b
}

func (r *reader) trigger(n *yaml.Node) Condition {
	s := r.text(n)
	name, rest, compared := strings.Cut(s, " ")
	if !compared {
		return Condition{Metric: name, At: at(n)}
	}
	op, v, ok := parseComparison(strings.TrimSpace(rest))
	if !ok {
		r.fail(n, "trigger %q is neither a name nor a comparison like \"error_rate > 0.02\"", s)
	}
	return Condition{name, op, v, at(n)}
}
