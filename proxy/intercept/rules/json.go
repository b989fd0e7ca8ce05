package rules

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
)

// object is one JSON object; encoding/json sorts its keys, so output is stable.
type object map[string]any

// JSON returns r in the schema of libnftables-json(5), which `nft -j -f` reads, with the
// policy routes beside it under "routes".
func (r Ruleset) JSON() ([]byte, error) {
	table := object{"family": "inet", "name": r.Table}
	list := []any{object{"metainfo": object{"json_schema_version": 1}},
		object{"add": object{"table": table}}, object{"delete": object{"table": table}}, object{"add": object{"table": table}}}
	for _, s := range r.Sets {
		set := object{"family": "inet", "table": r.Table, "name": s.Name, "type": s.Type, "elem": s.elements()}
		if s.Interval() {
			set["flags"] = []string{"interval"}
		}
		list = append(list, object{"add": object{"set": set}})
	}
	for _, c := range r.Chains {
		list = append(list, object{"add": object{"chain": object{"family": "inet", "table": r.Table, "name": c.Name,
			"type": c.Kind, "hook": c.Hook, "prio": c.Priority, "policy": "accept"}}})
		for _, rule := range c.Rules {
			list = append(list, object{"add": object{"rule": object{"family": "inet", "table": r.Table, "chain": c.Name, "expr": rule.statements()}}})
		}
	}
	routes := []object{}
	for _, p := range r.Routes {
		family := "ipv4"
		if p.IPv6 {
			family = "ipv6"
		}
		routes = append(routes, object{"family": family, "fwmark": p.Mark, "table": p.Table, "priority": p.Priority, "route": "local default dev lo"})
	}
	out, err := json.MarshalIndent(object{"nftables": list, "routes": routes}, "", "  ")
	return append(out, '\n'), err
}

func (s Set) elements() (out []any) {
	for _, p := range s.Ports {
		if p.Lo == p.Hi {
			out = append(out, p.Lo)
		} else {
			out = append(out, object{"range": []uint16{p.Lo, p.Hi}})
		}
	}
	for _, n := range s.Numbers {
		out = append(out, n)
	}
	for _, n := range s.Nets {
		out = append(out, prefixJSON(n))
	}
	return out
}

func prefixJSON(p netip.Prefix) any {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return object{"prefix": object{"addr": p.Addr().String(), "len": p.Bits()}}
}

func (r Rule) statements() (out []any) {
	for _, m := range r.If {
		out = append(out, m.json())
	}
	if (r.Then.Do == ToPort || r.Then.Do == ToSocket) && needTCP(r) != "" {
		out = append(out, Match{Field: Proto, Number: tcp}.json())
	}
	switch r.Then.Do {
	case ToPort:
		return append(out, object{"redirect": object{"port": r.Then.Value}})
	case ToMark:
		return append(out, setMark("meta", r.Then.Value), object{"accept": nil})
	case ToKnown:
		return append(out, setMark("ct", r.Then.Value), setMark("meta", r.Then.Value), object{"accept": nil})
	case ToSocket:
		return append(out, object{"tproxy": object{"port": r.Then.Value}}, object{"accept": nil})
	}
	return append(out, object{string(r.Then.Do): nil})
}

// setMark is a statement that gives a packet (meta) or its connection (ct) a mark.
func setMark(of string, value uint32) object {
	return object{"mangle": object{"key": object{of: object{"key": "mark"}}, "value": value}}
}

func (m Match) json() any {
	op := "=="
	if m.Not {
		op = "!="
	}
	kind, key, _ := strings.Cut(m.left(), " ")
	var left any
	switch {
	case m.Field == FromLocal:
		left = object{"meta": object{"key": "iifname"}}
	case m.Field == DstLocal:
		left = object{"fib": object{"result": "type", "flags": []string{"daddr"}}}
	case kind == "meta" || kind == "ct":
		left = object{kind: object{"key": key}}
	default:
		left = object{"payload": object{"protocol": kind, "field": key}}
	}
	var right any
	switch {
	case m.Set != "":
		right = "@" + m.Set
	case m.Field == Mark || m.Field == Known:
		right = m.Number
	case m.Field == FromLocal:
		right = "lo"
	case m.Net.IsValid():
		right = prefixJSON(m.Net)
	default:
		right = fmt.Sprint(m.right())
	}
	return object{"match": object{"op": op, "left": left, "right": right}}
}
