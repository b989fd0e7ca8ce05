package node_test

import (
	"context"
	"errors"
	"io"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
)

// An agent bound to a tenant serves that tenant and nobody else: neither reads nor writes
// of another's keys, nor calls that show everybody's, reach it.
func TestBoundToATenant(t *testing.T) {
	bubble(t, node.Options{RepairEvery: -1}, func(t *testing.T, w *world) {
		l, err := w.net.Listen("node", "bound:1")
		must(t, err)
		g := grpc.NewServer(node.BindTenant("acme")...)
		pb.RegisterVariablesServer(g, w.agent)
		pb.RegisterCoherenceServer(g, w.agent)
		pb.RegisterNodeAdminServer(g, w.agent.Admin())
		go g.Serve(l)
		defer g.Stop()
		cc, err := origintest.Dial(w.net, "pod", "bound:1")
		must(t, err)
		defer cc.Close()
		vars, coh, admin := pb.NewVariablesClient(cc), pb.NewCoherenceClient(cc), pb.NewNodeAdminClient(cc)
		w.origin.Put("x", "1") // of the default tenant
		w.read("x", "1")       // by a process that is not bound, so that there is something to get at

		read := func(tenants ...string) error {
			r := &pb.ReadRequest{}
			for _, name := range tenants {
				r.Keys = append(r.Keys, &pb.Key{Tenant: name, Session: "s", Name: "x"})
			}
			_, err := coh.Read(t.Context(), r)
			return err
		}
		received := func(s interface{ RecvMsg(any) error }, err error, m proto.Message) error {
			must(t, err)
			if err := s.RecvMsg(m); !errors.Is(err, io.EOF) {
				return err
			}
			return nil
		}
		dumped := func(tenant string) error {
			s, err := admin.Dump(t.Context(), &pb.DumpRequest{Tenant: tenant})
			return received(s, err, &pb.NodeEntry{})
		}
		watched := func(tenant string) error {
			s, err := vars.Watch(t.Context(), &pb.WatchRequest{Tenant: tenant, Session: "s"})
			return received(s, err, &pb.WatchEvent{})
		}
		flushed := func(tenant, session string) error {
			_, err := admin.Flush(t.Context(), &pb.FlushRequest{Tenant: tenant, Session: session})
			return err
		}
		shown := func(tenant string) error {
			_, err := admin.GetEntry(t.Context(), &pb.GetEntryRequest{Key: &pb.Key{Tenant: tenant, Session: "s", Name: "x"}})
			return err
		}
		_, changes := coh.Changes(t.Context(), &pb.ChangesRequest{})
		_, stat := admin.Stat(t.Context(), &pb.NodeStatRequest{})
		_, counts := admin.ReportReads(t.Context(), &pb.ReadCounts{})
		for _, tt := range []struct {
			name   string
			err    error
			denied bool
		}{
			{"read of its own", read("acme"), false}, {"read of another's", read("default"), true}, {"read of nobody's", read(""), true}, {"one of two", read("acme", "default"), true},
			{"dump of its own", dumped("acme"), false}, {"dump of another's", dumped("default"), true}, {"dump of all", dumped(""), true},
			{"watch of another's", watched("default"), true},
			{"flush of its own", flushed("acme", ""), false}, {"flush of all", flushed("", ""), true}, {"flush of a session of another's", flushed("", "s"), true},
			{"entry of its own", shown("acme"), false}, {"entry of another's", shown(""), true},
			{"everybody's changes", changes, true}, {"statistics", stat, false}, {"counts", counts, false},
		} {
			if (gstatus.Code(tt.err) == codes.PermissionDenied) != tt.denied || !tt.denied && tt.err != nil {
				t.Errorf("%s: %v, denied should be %v", tt.name, tt.err, tt.denied)
			}
		}
		w.read("x", "1") // and none of that flushed it
		if got := dump(t, w.admin(t), &pb.DumpRequest{Tenant: "default"}); len(got) != 1 || got[0] != "default/s/x present" {
			t.Errorf("the other tenant's entries: %v", got)
		}
	})
}

// Every unary call of Variables is judged by its tenant, those to come included: one that
// names another tenant is denied, whatever else it says.
func TestBoundVariablesCalls(t *testing.T) {
	bubble(t, node.Options{RepairEvery: -1}, func(t *testing.T, w *world) {
		l, err := w.net.Listen("node", "bound:1")
		must(t, err)
		g := grpc.NewServer(node.BindTenant("acme")...)
		pb.RegisterVariablesServer(g, w.agent)
		go g.Serve(l)
		defer g.Stop()
		cc, err := origintest.Dial(w.net, "pod", "bound:1")
		must(t, err)
		defer cc.Close()
		d, err := protoregistry.GlobalFiles.FindDescriptorByName("outrigger.v1.Variables")
		must(t, err)
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			m := methods.Get(i)
			if m.IsStreamingServer() {
				continue // Watch, above
			}
			for tenant, want := range map[string]bool{"default": true, "other": true, "acme": false} {
				kind, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
				must(t, err)
				req := kind.New()
				if f := m.Input().Fields().ByName("tenant"); f != nil {
					req.Set(f, protoreflect.ValueOfString(tenant))
				} else {
					key := &pb.Key{Tenant: tenant}
					req.Set(m.Input().Fields().ByName("key"), protoreflect.ValueOfMessage(key.ProtoReflect()))
				}
				answer, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
				must(t, err)
				err = cc.Invoke(context.Background(), "/outrigger.v1.Variables/"+string(m.Name()), req.Interface(), answer.New().Interface())
				if denied := gstatus.Code(err) == codes.PermissionDenied; denied != want {
					t.Errorf("%s of tenant %s: %v, denied should be %v", m.Name(), tenant, err, want)
				}
			}
		}
	})
}
