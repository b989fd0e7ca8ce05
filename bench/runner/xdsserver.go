package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// xdsReport is what an ADS server says on standard output: once when it serves, then
// after each line it is sent. The line "push" makes it push a changed RouteConfiguration,
// "collect" give back all memory it does not use, any other line nothing.
type xdsReport struct {
	Address string  `json:"address,omitempty"`
	At      int64   `json:"at"`     // when the push began, ns since 1970
	SetUS   float64 `json:"set_us"` // what the call that begins it took
	CPUUS   float64 `json:"cpu_us"` // processor time of the process so far
}

// xdsModels is a policy with two clusters a model, ten endpoints a cluster. turn changes
// the routes of the first model and nothing else.
func xdsModels(clusters, turn int) []*policy.Model {
	var out []*policy.Model
	for i := range clusters / 2 {
		m := policy.Model{Name: fmt.Sprintf("model-%04d", i), Salt: "s", Unit: experiments.UnitSession, MaxAttempts: 2, LastGood: "v1",
			Arms: []policy.Arm{{Name: "stable", Version: "v1", Ranges: []experiments.Range{{Start: 0, End: 9000}}},
				{Name: "candidate", Version: "v2", Ranges: []experiments.Range{{Start: 9000, End: experiments.Buckets}}}}}
		for v := range 2 {
			version := policy.Version{Name: fmt.Sprint("v", v+1)}
			for n := range 10 {
				version.Endpoints = append(version.Endpoints, policy.Endpoint{Address: fmt.Sprintf("10.%d.%d.%d:8000", i/200, i%200, 10*v+n+1), Region: "bench", Weight: 1})
			}
			m.Versions = append(m.Versions, version)
		}
		if i == 0 {
			m.Timeout = time.Duration(turn+1) * time.Second
		}
		n := m.Normalise()
		out = append(out, &n)
	}
	return out
}

// childXDSServer is our ADS server as the control plane runs it, or with -floor the least
// a server on the same gRPC library can do: the same bytes, marshalled once, to everyone.
func childXDSServer(_ context.Context, args []string, in io.Reader) (any, error) {
	f := flag.NewFlagSet("xdsserver", flag.ContinueOnError)
	clusters := f.Int("clusters", 50, "how many")
	floor := f.Bool("floor", false, "send pre-marshalled bytes and understand nothing")
	both := f.Bool("grpc", false, "serve gRPC clients too, who get a set of their own")
	dump := f.String("dump", "", "write the resources to this file and end")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	enc := translate.NewEncoder(translate.KindSidecar, translate.Options{})
	foreign := translate.NewEncoder(translate.KindGRPC, translate.Options{})
	turn := 0
	var change translate.Change // the last one
	next := func() (*translate.Resources, error) {
		turn++
		change = translate.Change{Position: uint64(turn)}
		models := xdsModels(*clusters, turn)
		if turn > 1 {
			models = models[:1]
		}
		for _, m := range models {
			change.Models = append(change.Models, translate.ModelChange{Model: m})
		}
		return enc.Encode(change)
	}
	if *dump != "" {
		return struct{}{}, dumpXDS(*dump, next)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	var push func(*translate.Resources) error
	var gs *grpc.Server
	if *floor {
		s := &floorADS{}
		gs = grpc.NewServer(append(variables.TransportOptions(), grpc.ForceServerCodecV2(rawCodec{}), grpc.UnknownServiceHandler(s.stream))...)
		push = s.push
	} else {
		s := adsserver.New(adsserver.Options{})
		gs = grpc.NewServer(append(variables.TransportOptions(), adsserver.TransportOptions()...)...)
		s.Register(gs)
		push = func(r *translate.Resources) error {
			err := s.Publish(adsserver.DefaultGroup, r, uint64(turn))
			if *both && err == nil {
				if r, err = foreign.Encode(change); err == nil {
					err = s.Publish(adsserver.KindGroup(translate.KindGRPC), r, uint64(turn))
				}
			}
			return err
		}
	}
	res, err := next()
	if err == nil {
		err = push(res)
	}
	if err != nil {
		return nil, err
	}
	served := make(chan error, 1)
	go func() { served <- gs.Serve(listener) }()
	defer func() { gs.Stop(); <-served }()
	say := json.NewEncoder(os.Stdout).Encode
	if err := say(xdsReport{Address: listener.Addr().String()}); err != nil {
		return nil, err
	}
	for sc := bufio.NewScanner(in); sc.Scan(); {
		r := xdsReport{CPUUS: float64(busy().Microseconds())}
		if sc.Text() == "collect" {
			debug.FreeOSMemory()
		}
		if sc.Text() == "push" {
			if res, err = next(); err != nil {
				return nil, err
			}
			start := time.Now()
			if err := push(res); err != nil {
				return nil, err
			}
			r.At, r.SetUS = start.UnixNano(), float64(time.Since(start).Nanoseconds())/1e3
		}
		if err := say(r); err != nil {
			return nil, err
		}
	}
	return struct{}{}, nil
}

// dumpXDS writes two sets, as peers read them: type URL → name → bytes.
func dumpXDS(path string, next func() (*translate.Resources, error)) error {
	var sets []map[string]map[string][]byte
	for range 2 {
		res, err := next()
		if err != nil {
			return err
		}
		set := map[string]map[string][]byte{}
		for _, t := range xdsStandard() {
			set[t] = map[string][]byte{}
			for _, name := range res.Names(t) {
				if set[t][name], err = translate.Marshal(res.Get(t, name)); err != nil {
					return err
				}
			}
		}
		sets = append(sets, set)
	}
	return writeJSON(path, sets)
}

// xdsStandard are the types every client knows.
func xdsStandard() []string {
	return []string{xds.TypeCluster, xds.TypeEndpoint, xds.TypeListener, xds.TypeRoute}
}

// floorADS answers each subscription with everything there is and repeats the changed
// routes at each push. It knows no versions, no nonces and no rejections.
type floorADS struct {
	mu      sync.Mutex
	initial map[string][]byte // by type
	streams map[*floorStream]struct{}
}

type floorStream struct {
	grpc.ServerStream
	mu sync.Mutex // SendMsg allows one sender at a time
}

func (s *floorStream) send(raw []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.SendMsg(&raw)
}

// push sends from one goroutine: there is nothing cheaper.
func (f *floorADS) push(res *translate.Resources) error {
	f.mu.Lock()
	first := f.initial == nil
	if first {
		f.initial, f.streams = map[string][]byte{}, map[*floorStream]struct{}{}
		for _, t := range xds.Types() {
			raw, err := deltaResponse(res, t, res.Names(t))
			if err != nil {
				f.mu.Unlock()
				return err
			}
			f.initial[t] = raw
		}
	}
	streams := make([]*floorStream, 0, len(f.streams))
	for s := range f.streams {
		streams = append(streams, s)
	}
	f.mu.Unlock()
	raw, err := deltaResponse(res, xds.TypeRoute, res.Names(xds.TypeRoute)[:1])
	if err != nil || first {
		return err
	}
	for _, s := range streams {
		if err := s.send(raw); err != nil {
			return err
		}
	}
	return nil
}

func (f *floorADS) stream(_ any, st grpc.ServerStream) error {
	s := &floorStream{ServerStream: st}
	f.mu.Lock()
	f.streams[s] = struct{}{}
	f.mu.Unlock()
	defer func() { f.mu.Lock(); delete(f.streams, s); f.mu.Unlock() }()
	for {
		var raw []byte
		if err := st.RecvMsg(&raw); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		var typeURL string
		acknowledges := false
		if err := fields(raw, func(n protowire.Number, value []byte) {
			switch n {
			case 2:
				typeURL = string(value)
			case 6:
				acknowledges = true
			}
		}); err != nil {
			return err
		}
		if !acknowledges {
			if err := s.send(f.initial[typeURL]); err != nil {
				return err
			}
		}
	}
}

// deltaResponse marshals a DeltaDiscoveryResponse.
func deltaResponse(res *translate.Resources, typeURL string, names []string) ([]byte, error) {
	out := protowire.AppendString(protowire.AppendTag(nil, 4, protowire.BytesType), typeURL)
	out = protowire.AppendString(protowire.AppendTag(out, 5, protowire.BytesType), "nonce")
	for _, name := range names {
		raw, err := translate.Marshal(res.Get(typeURL, name))
		if err != nil {
			return nil, err
		}
		value := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), typeURL)
		value = protowire.AppendBytes(protowire.AppendTag(value, 2, protowire.BytesType), raw)
		r := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "0123456789abcdef01234567")
		r = protowire.AppendBytes(protowire.AppendTag(r, 2, protowire.BytesType), value)
		r = protowire.AppendString(protowire.AppendTag(r, 3, protowire.BytesType), name)
		out = protowire.AppendBytes(protowire.AppendTag(out, 2, protowire.BytesType), r)
	}
	return out, nil
}

// rawCodec passes bytes through.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}
