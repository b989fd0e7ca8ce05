package variables

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// A declared consistency that nobody could follow is refused where it is declared; one
// that can be is kept by later sets, replaced by a new one and taken back by "".
func TestDeclaredConsistencyIsChecked(t *testing.T) {
	o := origin{region: "eu", incarnation: 1}
	register := func(c string) error {
		_, err := decideRegister(o, nil, "var_x_1", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"},
			Value: &pb.Value{Type: "float", Json: []byte("1")}, Metadata: map[string]string{"consistency": c}}, author{actor: "a", source: "a"})
		return err
	}
	set := func(c string) error {
		v := &variable{pb: &pb.Variable{Key: &pb.Key{Session: "s", Name: "x"}, Value: &pb.Value{Type: "float", Json: []byte("1")}, Version: &pb.Version{}}}
		_, err := decideSet(o, v, setInput{value: &pb.Value{Json: []byte("2")}, metadata: map[string]string{"consistency": c}}, author{actor: "a", source: "a"})
		return err
	}
	for _, c := range []string{"strong", "session", "eventual", "bounded(500ms)", "bounded(1h)", ""} {
		if err := register(c); err != nil {
			t.Errorf("register with %q: %v", c, err)
		}
		if err := set(c); err != nil {
			t.Errorf("set with %q: %v", c, err)
		}
	}
	for _, c := range []string{"Strong", "bounded", "bounded()", "bounded(0s)", "bounded(-1s)", "bounded(5)", "linearizable", " strong"} {
		if err := register(c); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("register with %q: %v", c, err)
		}
		if err := set(c); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("set with %q: %v", c, err)
		}
	}
}

func TestSessionKeysStayOnTheMachine(t *testing.T) {
	keys := identity.NewKeys()
	from := func(a net.Addr) context.Context {
		return peer.NewContext(context.Background(), &peer.Peer{Addr: a})
	}
	local, remote := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}, &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1}
	for _, tt := range []struct {
		name string
		keys *identity.Keys
		ctx  context.Context
		want codes.Code
	}{
		{"loopback", keys, from(local), codes.OK},
		{"a Unix socket", keys, from(&net.UnixAddr{Name: "/a", Net: "unix"}), codes.OK},
		{"another machine", keys, from(remote), codes.PermissionDenied},
		{"nobody knows who", keys, context.Background(), codes.PermissionDenied},
		{"another machine, with a verified certificate", keys, certified(from(remote), true), codes.OK},
		{"another machine, with a certificate nobody verified", keys, certified(from(remote), false), codes.PermissionDenied},
		{"none to give", nil, from(local), codes.FailedPrecondition},
	} {
		s := &Service{opt: Options{SessionKeys: func() *identity.Keys { return tt.keys }}}
		got, err := s.SessionKeys(tt.ctx, nil)
		if gstatus.Code(err) != tt.want || (err == nil) != (got.GetKeys() == keys.Text()) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
}

// certified is the context of a caller that showed a certificate.
func certified(ctx context.Context, verified bool) context.Context {
	p, _ := peer.FromContext(ctx)
	cert := &x509.Certificate{DNSNames: []string{"a"}}
	info := credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}}
	if verified {
		info.State.VerifiedChains = [][]*x509.Certificate{{cert}}
	}
	return peer.NewContext(ctx, &peer.Peer{Addr: p.Addr, AuthInfo: info})
}
