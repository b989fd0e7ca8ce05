package rules

import (
	"fmt"
	"strings"
)

// Text returns r as a script for `nft -f`, which replaces an installed one in one
// transaction. Policy routes, which nft cannot express, are comments in the words of
// ip(8).
func (r Ruleset) Text() string {
	var w strings.Builder
	// Adding before deleting makes the deletion succeed whether or not there is one.
	fmt.Fprintf(&w, "add table inet %s\ndelete table inet %s\ntable inet %s {\n", r.Table, r.Table, r.Table)
	for _, s := range r.Sets {
		fmt.Fprintf(&w, "\tset %s {\n\t\ttype %s\n", s.Name, s.Type)
		if s.Interval() {
			w.WriteString("\t\tflags interval\n")
		}
		fmt.Fprintf(&w, "\t\telements = { %s }\n\t}\n\n", strings.Join(s.texts(), ", "))
	}
	for i, c := range r.Chains {
		if i > 0 {
			w.WriteByte('\n')
		}
		fmt.Fprintf(&w, "\tchain %s {\n\t\ttype %s hook %s priority %d; policy accept;\n", c.Name, c.Kind, c.Hook, c.Priority)
		for _, rule := range c.Rules {
			fmt.Fprintf(&w, "\t\t%s\n", rule.text())
		}
		w.WriteString("\t}\n")
	}
	w.WriteString("}\n")
	for _, p := range r.Routes {
		ip := "ip"
		if p.IPv6 {
			ip = "ip -6"
		}
		fmt.Fprintf(&w, "# %s rule add fwmark %#x lookup %d priority %d\n", ip, p.Mark, p.Table, p.Priority)
		fmt.Fprintf(&w, "# %s route add local default dev lo table %d\n", ip, p.Table)
	}
	return w.String()
}

// texts are the elements as nft writes them.
func (s Set) texts() (out []string) {
	for _, p := range s.Ports {
		if p.Lo == p.Hi {
			out = append(out, fmt.Sprint(p.Lo))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", p.Lo, p.Hi))
		}
	}
	for _, n := range s.Numbers {
		if s.Type == TypeMark {
			out = append(out, fmt.Sprintf("%#x", n))
		} else {
			out = append(out, fmt.Sprint(n))
		}
	}
	for _, n := range s.Nets {
		out = append(out, n.String())
	}
	return out
}

func (r Rule) text() string {
	var parts []string
	for _, m := range r.If {
		parts = append(parts, m.text())
	}
	switch r.Then.Do {
	case ToPort:
		parts = append(parts, needTCP(r), fmt.Sprintf("redirect to :%d", r.Then.Value))
	case ToMark:
		parts = append(parts, fmt.Sprintf("meta mark set %#x accept", r.Then.Value))
	case ToKnown:
		parts = append(parts, fmt.Sprintf("ct mark set %#x meta mark set %#x accept", r.Then.Value, r.Then.Value))
	case ToSocket:
		parts = append(parts, needTCP(r), fmt.Sprintf("tproxy to :%d accept", r.Then.Value))
	default:
		parts = append(parts, string(r.Then.Do))
	}
	return strings.Join(strings.Fields(strings.Join(parts, " ")), " ")
}

// needTCP is the protocol match that port rewriting asks for, unless a port match
// implies it.
func needTCP(r Rule) string {
	for _, m := range r.If {
		if m.Field == DstPort {
			return ""
		}
	}
	return "meta l4proto tcp"
}

// left is the left side of a match, as nft writes it.
func (m Match) left() string {
	switch m.Field {
	case Proto:
		return "meta l4proto"
	case Family:
		return "meta nfproto"
	case Socket:
		return "meta skuid"
	case Group:
		return "meta skgid"
	case Mark:
		return "meta mark"
	case DstPort:
		return "tcp dport"
	case DstIPv4:
		return "ip daddr"
	case DstIPv6:
		return "ip6 daddr"
	case SrcIPv4:
		return "ip saddr"
	case SrcIPv6:
		return "ip6 saddr"
	case DstLocal:
		return "fib daddr type"
	case Answer:
		return "ct direction"
	case Known:
		return "ct mark"
	case First:
		return "ct state"
	}
	return "iifname"
}

// right is the right side.
func (m Match) right() string {
	switch {
	case m.Set != "":
		return "@" + m.Set
	case m.Field == Proto:
		return "tcp"
	case m.Field == Family:
		return fmt.Sprintf("ipv%d", m.Number)
	case m.Field == Mark || m.Field == Known:
		return fmt.Sprintf("%#x", m.Number)
	case m.Field == DstLocal:
		return "local"
	case m.Field == FromLocal:
		return `"lo"`
	case m.Field == Answer || m.Field == First:
		return string(m.Field)
	case m.Net.IsSingleIP():
		return m.Net.Addr().String()
	}
	return m.Net.String()
}

func (m Match) text() string {
	not := ""
	if m.Not {
		not = "!= "
	}
	return m.left() + " " + not + m.right()
}
