package main

import (
	"context"
	"errors"
	"net"
	"strings"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// dialTLS is how a process or verb knows the control planes it dials, and proves itself to
// them. All empty = plaintext. Unix sockets are plaintext always: the kernel says who may.
type dialTLS struct{ ca, cert, key, serverName string }

func (d *dialTLS) bind(f *pflag.FlagSet) {
	f.StringVar(&d.ca, "control-ca", "", "file with the CAs that sign control planes' certificates, PEM: connect to them by TLS; looked at every 2 s")
	f.StringVar(&d.cert, "control-cert", "", "file with the certificate to show to control planes, PEM")
	f.StringVar(&d.key, "control-key", "", "file with the private key of --control-cert, PEM")
	f.StringVar(&d.serverName, "control-server-name", "", "whom a control plane's certificate must name, a host or spiffe://DOMAIN/PATH with * in the path (default: the host dialled)")
}

// open reads the files; nil = plaintext.
func (d *dialTLS) open(o identity.CredentialsOptions) (*identity.Credentials, error) {
	if *d == (dialTLS{}) {
		return nil, nil
	}
	if d.ca == "" && d.cert == "" && d.key == "" {
		return nil, configError{errors.New("--control-server-name is given without --control-ca; give the CA's certificate")}
	}
	o.Use, o.ServerName = identity.Dial, d.serverName
	c, err := identity.OpenCredentials(identity.Files{Cert: d.cert, Key: d.key, CA: d.ca,
		CertName: "--control-cert", KeyName: "--control-key", CAName: "--control-ca"}, o)
	if err != nil {
		return nil, configError{err}
	}
	return c, nil
}

// useTLS makes dialControl and feedDialer use d, and has its files followed.
func (p *process) useTLS(d *dialTLS) (err error) {
	p.control, err = d.open(identity.CredentialsOptions{Logger: p.log, Meter: p.tel.Meter("identity")})
	if p.control != nil {
		p.run("certificates", p.control.Run)
	}
	return err
}

// dialControl is dialMesh to a control plane.
func (p *process) dialControl(target string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	if secured(p.control, target) {
		more = append(more, grpc.WithTransportCredentials(p.control.Client()))
	}
	return p.dialMesh(target, more...)
}

// secured reports whether TLS is spoken with a target: with all that are not Unix sockets.
func secured(c *identity.Credentials, target string) bool {
	return c != nil && !strings.HasPrefix(target, "unix:")
}

// encrypted puts the connections of dial to address under TLS, if control planes are.
func (p *process) encrypted(address string, dial func(context.Context) (net.Conn, error)) func(context.Context) (net.Conn, error) {
	if p.control == nil {
		return dial
	}
	return func(ctx context.Context) (net.Conn, error) {
		raw, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		return p.control.Handshake(ctx, address, raw)
	}
}
