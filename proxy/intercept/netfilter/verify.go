package netfilter

import (
	"encoding/hex"
	"fmt"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

// Verify compares what the kernel holds with r and returns the differences, one line
// each; none means that r is in force. It changes nothing.
func Verify(r rules.Ruleset) ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, explain("open netlink", err)
	}
	t, err := lookup(c, r.Table)
	if err != nil {
		return nil, explain("list tables", err)
	}
	if t == nil {
		return []string{"table inet " + r.Table + " is not installed"}, nil
	}
	v := &verifier{c: c, t: t, r: r}
	for _, step := range []func() error{v.sets, v.chains, v.routes} {
		if err := step(); err != nil {
			return nil, explain("read table inet "+r.Table, err)
		}
	}
	return v.found, nil
}

type verifier struct {
	c     *nftables.Conn
	t     *nftables.Table
	r     rules.Ruleset
	found []string
}

func (v *verifier) say(format string, args ...any) {
	v.found = append(v.found, fmt.Sprintf(format, args...))
}

func (v *verifier) sets() error {
	have, err := v.c.GetSets(v.t)
	if err != nil {
		return err
	}
	for _, h := range have {
		if !slices.ContainsFunc(v.r.Sets, func(s rules.Set) bool { return s.Name == h.Name }) {
			v.say("set %s is not ours", h.Name)
		}
	}
	for _, s := range v.r.Sets {
		i := slices.IndexFunc(have, func(h *nftables.Set) bool { return h.Name == s.Name })
		if i < 0 {
			v.say("set %s is missing", s.Name)
			continue
		}
		got, err := v.c.GetSetElements(have[i])
		if err != nil {
			return err
		}
		if !slices.Equal(keys(got), keys(elements(s))) {
			v.say("set %s holds other elements", s.Name)
		}
	}
	return nil
}

// keys makes elements comparable; their order means nothing.
func keys(all []nftables.SetElement) (out []string) {
	for _, e := range all {
		out = append(out, fmt.Sprintf("%s %v", hex.EncodeToString(e.Key), e.IntervalEnd))
	}
	slices.Sort(out)
	return out
}

func (v *verifier) chains() error {
	have, err := v.c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return err
	}
	have = slices.DeleteFunc(have, func(h *nftables.Chain) bool { return h.Table.Name != v.r.Table })
	for _, h := range have {
		if !slices.ContainsFunc(v.r.Chains, func(c rules.Chain) bool { return c.Name == h.Name }) {
			v.say("chain %s is not ours", h.Name)
		}
	}
	for _, c := range v.r.Chains {
		i := slices.IndexFunc(have, func(h *nftables.Chain) bool { return h.Name == c.Name })
		if i < 0 {
			v.say("chain %s is missing", c.Name)
			continue
		}
		if err := v.chain(c, have[i]); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) chain(c rules.Chain, have *nftables.Chain) error {
	want := chain(v.t, c)
	if have.Hooknum == nil || have.Priority == nil || have.Policy == nil || have.Type != want.Type ||
		*have.Hooknum != *want.Hooknum || *have.Priority != *want.Priority || *have.Policy != *want.Policy {
		v.say("chain %s hangs elsewhere, or does not accept by default", c.Name)
	}
	got, err := v.c.GetRules(v.t, have)
	if err != nil {
		return err
	}
	if len(got) != len(c.Rules) {
		v.say("chain %s has %d rules, want %d", c.Name, len(got), len(c.Rules))
		return nil
	}
	for i, rule := range c.Rules {
		if !reflect.DeepEqual(plain(got[i].Exprs), plain(exprs(rule))) {
			v.say("chain %s: rule %d differs", c.Name, i+1)
		}
	}
	return nil
}

// plain drops what the kernel numbers by itself, and what the library can write but not
// read: the tproxy expression (the port before it and the accept after it remain), and
// which register a connection's mark is set from (there is only one).
func plain(all []expr.Any) (out []expr.Any) {
	for _, e := range all {
		switch e := e.(type) {
		case *expr.TProxy:
		case *expr.Ct:
			c := *e
			if c.SourceRegister {
				c.Register, c.SourceRegister = 0, false
			}
			out = append(out, &c)
		case *expr.Lookup:
			c := *e
			c.SetID = 0
			out = append(out, &c)
		default:
			out = append(out, e)
		}
	}
	return out
}

func (v *verifier) routes() error {
	for _, r := range v.r.Routes {
		family := "IPv4"
		if r.IPv6 {
			family = "IPv6"
		}
		if ok, err := hasRule(r); err != nil {
			return err
		} else if !ok {
			v.say("the %s rule for mark %#x is missing", family, r.Mark)
		}
		if ok, err := hasRoute(r); err != nil {
			return err
		} else if !ok {
			v.say("the %s local route in table %d is missing", family, r.Table)
		}
	}
	return nil
}
