package netfilter

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

// reg is the register every comparison uses.
const reg = 1

func chain(t *nftables.Table, c rules.Chain) *nftables.Chain {
	hook, accept := nftables.ChainHookPrerouting, nftables.ChainPolicyAccept
	if c.Hook == "output" {
		hook = nftables.ChainHookOutput
	}
	return &nftables.Chain{Table: t, Name: c.Name, Type: nftables.ChainType(c.Kind), Hooknum: hook,
		Priority: nftables.ChainPriorityRef(nftables.ChainPriority(c.Priority)), Policy: &accept}
}

func set(t *nftables.Table, s rules.Set) *nftables.Set {
	out := &nftables.Set{Table: t, Name: s.Name, Interval: s.Interval()}
	switch s.Type {
	case rules.TypePort:
		out.KeyType = nftables.TypeInetService
	case rules.TypeIPv4:
		out.KeyType = nftables.TypeIPAddr
	case rules.TypeIPv6:
		out.KeyType = nftables.TypeIP6Addr
	case rules.TypeUID:
		out.KeyType = nftables.TypeUID
	case rules.TypeGID:
		out.KeyType = nftables.TypeGID
	case rules.TypeMark:
		out.KeyType = nftables.TypeMark
	}
	if !s.Interval() {
		out.KeyByteOrder = binaryutil.NativeEndian // so that nft prints the numbers right
	}
	return out
}

// elements are the set's: an interval is its first key and the key after its last, the
// latter left out at the end of the number space.
func elements(s rules.Set) (out []nftables.SetElement) {
	for _, n := range s.Numbers {
		out = append(out, nftables.SetElement{Key: binaryutil.NativeEndian.PutUint32(n)})
	}
	for _, p := range s.Ports {
		out = append(out, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p.Lo)})
		if p.Hi < 65535 {
			out = append(out, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p.Hi + 1), IntervalEnd: true})
		}
	}
	for _, n := range s.Nets {
		out = append(out, nftables.SetElement{Key: n.Addr().AsSlice()})
		if next := last(n).Next(); next.IsValid() {
			out = append(out, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// last is the highest address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b) // b has 4 or 16 bytes
	return a
}

// exprs compiles one rule, to what nft would make of its text.
func exprs(r rules.Rule) (out []expr.Any) {
	transport := false
	for _, m := range r.If {
		out = append(out, match(m)...)
		transport = transport || m.Field == rules.DstPort
	}
	if (r.Then.Do == rules.ToPort || r.Then.Do == rules.ToSocket) && !transport {
		out = append(out, proto(expr.CmpOpEq)...)
	}
	port := func() expr.Any {
		return &expr.Immediate{Register: reg, Data: binaryutil.BigEndian.PutUint16(uint16(r.Then.Value))}
	}
	accept := &expr.Verdict{Kind: expr.VerdictAccept}
	switch r.Then.Do {
	case rules.ToPort:
		return append(out, port(), &expr.Redir{RegisterProtoMin: reg, RegisterProtoMax: reg, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED})
	case rules.ToSocket:
		return append(out, port(), &expr.TProxy{Family: unix.NFPROTO_UNSPEC, RegPort: reg}, accept)
	case rules.ToMark:
		return append(out, mark(r), &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg}, accept)
	case rules.ToKnown:
		return append(out, mark(r), &expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: reg},
			mark(r), &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg}, accept)
	}
	return append(out, &expr.Verdict{Kind: expr.VerdictReturn})
}

func mark(r rules.Rule) expr.Any {
	return &expr.Immediate{Register: reg, Data: binaryutil.NativeEndian.PutUint32(r.Then.Value)}
}

func match(m rules.Match) []expr.Any {
	op := expr.CmpOpEq
	if m.Not {
		op = expr.CmpOpNeq
	}
	switch m.Field {
	case rules.Proto:
		return proto(op)
	case rules.Family:
		return family(m.Number, op)
	case rules.Socket:
		return append(meta(expr.MetaKeySKUID), compare(m, op))
	case rules.Group:
		return append(meta(expr.MetaKeySKGID), compare(m, op))
	case rules.Mark:
		return append(meta(expr.MetaKeyMARK), compare(m, op))
	case rules.DstPort:
		return append(proto(expr.CmpOpEq), payload(expr.PayloadBaseTransportHeader, 2, 2), compare(m, op))
	case rules.DstIPv4:
		return address(m, op, 4, 16)
	case rules.SrcIPv4:
		return address(m, op, 4, 12)
	case rules.DstIPv6:
		return address(m, op, 6, 24)
	case rules.SrcIPv6:
		return address(m, op, 6, 8)
	case rules.DstLocal:
		return []expr.Any{&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true},
			&expr.Cmp{Op: op, Register: reg, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)}}
	case rules.Answer:
		const reply = 1 // IP_CT_DIR_REPLY
		return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg}, &expr.Cmp{Op: op, Register: reg, Data: []byte{reply}}}
	case rules.Known:
		return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: reg}, compare(m, op)}
	case rules.First:
		return []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: reg},
			&expr.Cmp{Op: op, Register: reg, Data: binaryutil.NativeEndian.PutUint32(expr.CtStateBitNEW)}}
	}
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, "lo")
	return append(meta(expr.MetaKeyIIFNAME), &expr.Cmp{Op: op, Register: reg, Data: name})
}

func meta(k expr.MetaKey) []expr.Any { return []expr.Any{&expr.Meta{Key: k, Register: reg}} }

func proto(op expr.CmpOp) []expr.Any {
	return append(meta(expr.MetaKeyL4PROTO), &expr.Cmp{Op: op, Register: reg, Data: []byte{unix.IPPROTO_TCP}})
}

func family(version uint32, op expr.CmpOp) []expr.Any {
	f := byte(unix.NFPROTO_IPV4)
	if version == 6 {
		f = unix.NFPROTO_IPV6
	}
	return append(meta(expr.MetaKeyNFPROTO), &expr.Cmp{Op: op, Register: reg, Data: []byte{f}})
}

func payload(base expr.PayloadBase, offset, length uint32) expr.Any {
	return &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: reg, Base: base, Offset: offset, Len: length}
}

// address compares the address at offset of an IP header, after the family.
func address(m rules.Match, op expr.CmpOp, version, offset uint32) []expr.Any {
	length := uint32(4)
	if version == 6 {
		length = 16
	}
	out := append(family(version, expr.CmpOpEq), payload(expr.PayloadBaseNetworkHeader, offset, length))
	if m.Set != "" {
		return append(out, compare(m, op))
	}
	// A prefix of whole bytes is compared without a mask; rules makes no others.
	if n := uint32(m.Net.Bits()) / 8; n < length {
		length = n
		out[len(out)-1] = payload(expr.PayloadBaseNetworkHeader, offset, n)
	}
	return append(out, &expr.Cmp{Op: op, Register: reg, Data: m.Net.Addr().AsSlice()[:length]})
}

// compare looks the register up in a set, or compares it with a number.
func compare(m rules.Match, op expr.CmpOp) expr.Any {
	if m.Set != "" {
		return &expr.Lookup{SourceRegister: reg, SetName: m.Set, Invert: m.Not}
	}
	return &expr.Cmp{Op: op, Register: reg, Data: binaryutil.NativeEndian.PutUint32(m.Number)}
}
