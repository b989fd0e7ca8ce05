package rules

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// Each configuration gives exactly the rules in testdata, as text and as JSON.
func TestGolden(t *testing.T) {
	p := netip.MustParsePrefix
	for name, c := range map[string]Config{
		"minimal":  {OutboundPort: 15001, UIDs: []uint32{1337}},
		"loopback": {OutboundPort: 15001, UIDs: []uint32{1337}, LoopbackPorts: []uint16{50051, 8080, 50051}},
		"inbound":  {InboundPort: 15006, InboundSkipPorts: []Range{{22, 22}}, InboundSkipNets: []netip.Prefix{p("10.0.0.0/8")}},
		"ipv4":     {OutboundPort: 15001, Marks: []uint32{7}, LoopbackPorts: []uint16{50051}, NoIPv6: true, OutboundSkipNets: []netip.Prefix{p("fd00::/8")}},
		"full": {Table: "pod-1", OutboundPort: 15001, InboundPort: 15006, UIDs: []uint32{1337, 7}, GIDs: []uint32{8}, Marks: []uint32{0x1f},
			LoopbackPorts: []uint16{50051}, OutboundSkipPorts: []Range{{25, 25}, {20, 30}, {31, 40}, {9000, 9100}},
			OutboundSkipNets:  []netip.Prefix{p("10.0.0.0/8"), p("10.1.2.3/16"), p("192.168.7.9/24"), p("fd00:1::/32"), p("fd00:1:2::/48")},
			OutboundOnlyPorts: []Range{{1, 1023}}, InboundOnlyPorts: []Range{{80, 80}, {443, 443}}},
		"tproxy": {Mode: TProxy, OutboundPort: 15001, InboundPort: 15006, UIDs: []uint32{1337}, LoopbackPorts: []uint16{50051}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := Build(c)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := r.JSON()
			if err != nil {
				t.Fatal(err)
			}
			for file, got := range map[string]string{name + ".nft": r.Text(), name + ".json": string(raw)} {
				path := filepath.Join("testdata", file)
				if *update {
					if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(path)
				if err != nil || got != string(want) {
					t.Errorf("%s differs (run with -update and read the change): %v\n%s", path, err, got)
				}
			}
		})
	}
}

// A configuration that would loop, or that the kernel would refuse, is refused by name.
func TestRefused(t *testing.T) {
	f := func(c Config, want string) {
		t.Helper()
		_, err := Build(c)
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v, want %q", c, err, want)
		}
	}
	f(Config{}, "nothing to intercept")
	f(Config{OutboundPort: 1}, "needs the sidecar's uid")
	f(Config{OutboundPort: 1, InboundPort: 1, UIDs: []uint32{1}}, "are both 1")
	f(Config{InboundPort: 1, LoopbackPorts: []uint16{2}}, "need an outbound port")
	f(Config{OutboundPort: 1, UIDs: []uint32{1}, LoopbackPorts: []uint16{1}}, "own interception port")
	f(Config{OutboundPort: 1, UIDs: []uint32{1}, LoopbackPorts: []uint16{0}}, "loopback port 0")
	f(Config{OutboundPort: 1, Marks: []uint32{0}}, "mark 0")
	f(Config{OutboundPort: 1, Marks: []uint32{9}, RouteMark: 9, Mode: TProxy}, "mark 0x9")
	f(Config{OutboundPort: 1, UIDs: []uint32{1}, Mode: "ebpf"}, `mode "ebpf"`)
	for _, name := range []string{"Pod", "1a", "a b", "x;flush", strings.Repeat("a", 33)} {
		f(Config{OutboundPort: 1, UIDs: []uint32{1}, Table: name}, "table")
	}
	f(Config{OutboundPort: 1, UIDs: make([]uint32, 1025)}, "1025 uids; at most 1024")
	f(Config{OutboundPort: 1, UIDs: []uint32{1}, OutboundSkipNets: []netip.Prefix{{}}}, "prefix")
	f(Config{OutboundPort: 1, UIDs: []uint32{1}, OutboundSkipNets: []netip.Prefix{netip.MustParsePrefix("::ffff:10.0.0.0/104")}}, "prefix")
}

func TestParseRange(t *testing.T) {
	f := func(in string, want Range, ok bool) {
		t.Helper()
		if r, err := ParseRange(in); r != want || (err == nil) != ok {
			t.Errorf("%q: %v, %v", in, r, err)
		}
	}
	f("80", Range{80, 80}, true)
	f("80-90", Range{80, 90}, true)
	for _, bad := range []string{"", "0", "65536", "90-80", "-", "80-", "x", "1-2-3", " 80"} {
		f(bad, Range{}, false)
	}
}

// FuzzIntervals: whatever ranges and prefixes are given, a set's elements are sorted, do
// not overlap, and cover exactly the same ports and addresses.
func FuzzIntervals(f *testing.F) {
	f.Add([]byte{0, 80, 0, 90, 0, 85, 0, 99, 10, 0, 0, 0, 8, 10, 1, 0, 0, 16})
	f.Fuzz(func(t *testing.T, in []byte) {
		var ranges []Range
		var nets []netip.Prefix
		for i := 0; i+5 <= len(in) && i < 100; i += 5 {
			lo, hi := uint16(in[i])<<8|uint16(in[i+1]), uint16(in[i+2])<<8|uint16(in[i+3])
			ranges = append(ranges, Range{min(lo, hi), max(lo, hi)})
			nets = append(nets, netip.PrefixFrom(netip.AddrFrom4([4]byte(in[i:i+4])), int(in[i+4]%33)))
		}
		if len(ranges) == 0 {
			return
		}
		b := &builder{}
		b.ports("p", ranges)
		b.nets("n", TypeIPv4, nets)
		ports, kept := b.r.Sets[0].Ports, b.r.Sets[1].Nets
		for i := 1; i < len(ports); i++ {
			if int(ports[i].Lo) <= int(ports[i-1].Hi)+1 {
				t.Fatalf("%v overlap or touch", ports)
			}
		}
		for port := 0; port < 65536; port += 7 {
			in := func(r Range) bool { return int(r.Lo) <= port && port <= int(r.Hi) }
			if slices.ContainsFunc(ranges, in) != slices.ContainsFunc(ports, in) {
				t.Fatalf("port %d: %v became %v", port, ranges, ports)
			}
		}
		for i, p := range kept {
			for _, q := range kept[i+1:] {
				if p.Overlaps(q) {
					t.Fatalf("%v overlaps %v", p, q)
				}
			}
		}
		for _, n := range nets {
			if !slices.ContainsFunc(kept, func(k netip.Prefix) bool { return k.Bits() <= n.Bits() && k.Contains(n.Addr()) }) {
				t.Fatalf("%v is not covered by %v", n, kept)
			}
		}
		for _, k := range kept {
			if !slices.ContainsFunc(nets, func(n netip.Prefix) bool { return n.Masked() == k }) {
				t.Fatalf("%v was not asked for", k)
			}
		}
	})
}
