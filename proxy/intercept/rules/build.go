package rules

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
)

// builder collects sets and chains.
type builder struct {
	c Config
	r Ruleset
}

// tcp is IPPROTO_TCP.
const tcp = 6

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
)

// outbound is the chain that sees what processes of this machine send.
func (b *builder) outbound() {
	c := b.c
	ch := Chain{Name: "outbound", Kind: "nat", Hook: "output", Priority: dstnat}
	then := Verdict{ToPort, uint32(c.OutboundPort)}
	if c.Mode == TProxy {
		// A route chain decides the way again after the mark has changed.
		ch.Kind, ch.Priority, then = "route", mangle, Verdict{ToKnown, c.RouteMark}
	}
	b.common(&ch)
	if c.Mode == TProxy {
		ch.add(Verdict{Do: Return}, Match{Field: Answer})
	}
	ch.leave(b.numbers("own_uids", TypeUID, c.UIDs), Socket)
	ch.leave(b.numbers("own_gids", TypeGID, c.GIDs), Group)
	ch.leave(b.numbers("own_marks", TypeMark, c.Marks), Mark)
	if c.Mode == TProxy {
		ch.add(Verdict{ToMark, c.RouteMark}, Match{Field: Known, Number: c.RouteMark})
		ch.add(Verdict{Do: Return}, Match{Field: First, Not: true})
	}
	if served := b.ports("served_ports", single(c.LoopbackPorts)); served != "" {
		ch.add(then, Match{Field: DstIPv4, Net: loopback4}, Match{Field: DstPort, Set: served})
		if !c.NoIPv6 {
			ch.add(then, Match{Field: DstIPv6, Net: loopback6}, Match{Field: DstPort, Set: served})
		}
	}
	ch.add(Verdict{Do: Return}, Match{Field: DstLocal})
	b.filter(&ch, "out", c.OutboundSkipPorts, c.OutboundSkipNets, c.OutboundOnlyPorts, DstIPv4, DstIPv6)
	ch.add(then)
	b.r.Chains = append(b.r.Chains, ch)
}

// inboundRedirect is the chain that sees what arrives, in mode Redirect.
func (b *builder) inboundRedirect() {
	ch := Chain{Name: "inbound", Kind: "nat", Hook: "prerouting", Priority: dstnat}
	b.common(&ch)
	ch.add(Verdict{Do: Return}, Match{Field: FromLocal})
	b.inbound(&ch, Verdict{ToPort, uint32(b.c.InboundPort)})
	b.r.Chains = append(b.r.Chains, ch)
}

// divert is the chain that gives packets to the sidecar's sockets in mode TProxy: those
// that outbound has marked, which come round by way of lo, and those that arrive.
func (b *builder) divert() {
	ch := Chain{Name: "divert", Kind: "filter", Hook: "prerouting", Priority: mangle}
	b.common(&ch)
	if b.c.OutboundPort != 0 {
		ch.add(Verdict{ToSocket, uint32(b.c.OutboundPort)}, Match{Field: FromLocal}, Match{Field: Mark, Number: b.c.RouteMark})
	}
	ch.add(Verdict{Do: Return}, Match{Field: FromLocal})
	if b.c.InboundPort != 0 {
		b.inbound(&ch, Verdict{ToSocket, uint32(b.c.InboundPort)})
	}
	b.r.Chains = append(b.r.Chains, ch)
}

// inbound adds the rules of what arrives.
func (b *builder) inbound(ch *Chain, then Verdict) {
	c := b.c
	ch.add(Verdict{Do: Return}, Match{Field: DstLocal, Not: true})
	b.filter(ch, "in", c.InboundSkipPorts, c.InboundSkipNets, c.InboundOnlyPorts, SrcIPv4, SrcIPv6)
	ch.add(then)
}

// common starts every chain.
func (b *builder) common(ch *Chain) {
	ch.add(Verdict{Do: Return}, Match{Field: Proto, Number: tcp, Not: true})
	if b.c.NoIPv6 {
		ch.add(Verdict{Do: Return}, Match{Field: Family, Number: 6})
	}
}

// filter adds the exclusions and inclusions of one direction.
func (b *builder) filter(ch *Chain, prefix string, skip []Range, nets []netip.Prefix, only []Range, v4, v6 Field) {
	ch.leave(b.ports(prefix+"_skip_ports", skip), DstPort)
	ch.leave(b.nets(prefix+"_skip_v4", TypeIPv4, nets), v4)
	ch.leave(b.nets(prefix+"_skip_v6", TypeIPv6, nets), v6)
	if set := b.ports(prefix+"_only_ports", only); set != "" {
		ch.add(Verdict{Do: Return}, Match{Field: DstPort, Set: set, Not: true})
	}
}

func (ch *Chain) add(v Verdict, m ...Match) { ch.Rules = append(ch.Rules, Rule{If: m, Then: v}) }

// leave adds a rule that leaves alone what is in set, if there is a set.
func (ch *Chain) leave(set string, f Field) {
	if set != "" {
		ch.add(Verdict{Do: Return}, Match{Field: f, Set: set})
	}
}

// numbers adds a set of plain numbers and returns its name, "" for none.
func (b *builder) numbers(name string, t Type, v []uint32) string {
	if len(v) == 0 {
		return ""
	}
	v = slices.Clone(v)
	slices.Sort(v)
	b.r.Sets = append(b.r.Sets, Set{Name: name, Type: t, Numbers: slices.Compact(v)})
	return name
}

// ports adds a set of port ranges; overlapping and adjacent ones become one, since the
// kernel refuses overlaps.
func (b *builder) ports(name string, v []Range) string {
	if len(v) == 0 {
		return ""
	}
	v = slices.Clone(v)
	slices.SortFunc(v, func(a, b Range) int { return cmp.Or(cmp.Compare(a.Lo, b.Lo), cmp.Compare(a.Hi, b.Hi)) })
	merged := v[:1]
	for _, r := range v[1:] {
		last := &merged[len(merged)-1]
		if int(r.Lo) <= int(last.Hi)+1 {
			last.Hi = max(last.Hi, r.Hi)
		} else {
			merged = append(merged, r)
		}
	}
	b.r.Sets = append(b.r.Sets, Set{Name: name, Type: TypePort, Ports: merged})
	return name
}

// nets adds a set of the prefixes of one family; those within others are dropped.
func (b *builder) nets(name string, t Type, v []netip.Prefix) string {
	if t == TypeIPv6 && b.c.NoIPv6 {
		return ""
	}
	var own []netip.Prefix
	for _, p := range v {
		if p.Addr().Is4() == (t == TypeIPv4) {
			own = append(own, p.Masked())
		}
	}
	if len(own) == 0 {
		return ""
	}
	// Shorter prefixes of the same address come first, so that what they cover follows.
	slices.SortFunc(own, func(a, b netip.Prefix) int {
		return cmp.Or(bytes.Compare(a.Addr().AsSlice(), b.Addr().AsSlice()), cmp.Compare(a.Bits(), b.Bits()))
	})
	kept := own[:1]
	for _, p := range own[1:] {
		if !kept[len(kept)-1].Contains(p.Addr()) {
			kept = append(kept, p)
		}
	}
	b.r.Sets = append(b.r.Sets, Set{Name: name, Type: t, Nets: kept})
	return name
}

func single(ports []uint16) []Range {
	out := make([]Range, len(ports))
	for i, p := range ports {
		out[i] = Range{p, p}
	}
	return out
}
