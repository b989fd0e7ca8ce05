package authz

import (
	"encoding/base64"
	"net"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

const secret = "correct horse battery staple"

func basic(user, pass string) []string {
	return []string{"Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+pass))}
}

func TestDecide(t *testing.T) {
	bearer := []string{"Bearer " + secret}
	const allow = outrigger.Kind(255)
	cases := []struct {
		name  string
		token string
		req   Request
		want  outrigger.Kind
	}{
		{"no token, local read", "", Request{Local: true}, allow},
		{"no token, local write", "", Request{Local: true, Mutating: true}, allow},
		{"no token, remote read", "", Request{}, outrigger.Denied},
		{"no token, remote write", "", Request{Mutating: true}, outrigger.Denied},
		{"no token, remote write with a made-up one", "", Request{Mutating: true, Authorization: bearer}, outrigger.Denied},
		{"no token, forwarded by a local proxy", "", Request{Local: true, Forwarded: true}, outrigger.Denied},
		{"token, local read without", secret, Request{Local: true}, allow},
		{"token, local write without", secret, Request{Local: true, Mutating: true}, outrigger.Unauthorised},
		{"token, local write with", secret, Request{Local: true, Mutating: true, Authorization: bearer}, allow},
		{"token, remote read without", secret, Request{}, outrigger.Unauthorised},
		{"token, remote read with", secret, Request{Authorization: bearer}, allow},
		{"token, remote write with", secret, Request{Mutating: true, Authorization: bearer}, allow},
		{"token, scheme in another case", secret, Request{Mutating: true, Authorization: []string{"bearer " + secret}}, allow},
		{"token, forwarded read without", secret, Request{Local: true, Forwarded: true}, outrigger.Unauthorised},
		{"wrong token", secret, Request{Mutating: true, Authorization: []string{"Bearer " + secret + "x"}}, outrigger.Unauthorised},
		{"prefix of the token", secret, Request{Mutating: true, Authorization: []string{"Bearer " + secret[:20]}}, outrigger.Unauthorised},
		{"empty token", secret, Request{Mutating: true, Authorization: []string{"Bearer "}}, outrigger.Unauthorised},
		{"no scheme", secret, Request{Mutating: true, Authorization: []string{secret}}, outrigger.Unauthorised},
		{"given twice", secret, Request{Mutating: true, Authorization: append(bearer, bearer...)}, outrigger.Unauthorised},
		{"basic read", secret, Request{Authorization: basic("me", secret)}, allow},
		{"basic write is refused", secret, Request{Mutating: true, Authorization: basic("me", secret)}, outrigger.Unauthorised},
		{"basic, wrong password", secret, Request{Authorization: basic(secret, "x")}, outrigger.Unauthorised},
		{"local read with a wrong token", secret, Request{Local: true, Authorization: []string{"Bearer " + secret + "x"}}, outrigger.Unauthorised},
		{"basic, not base64", secret, Request{Authorization: []string{"Basic !!"}}, outrigger.Unauthorised},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p, err := New(c.token)
			if err != nil {
				t.Fatal(err)
			}
			_, err = p.Identify(c.req)
			if c.want == allow {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				return
			}
			if !outrigger.IsKind(err, c.want) {
				t.Fatalf("got %v, want kind %v", err, c.want)
			}
			if strings.Contains(err.Error(), secret) {
				t.Fatalf("the error repeats the secret: %v", err)
			}
		})
	}
}

func TestNewRefusesShortTokens(t *testing.T) {
	if _, err := New("hunter2"); !outrigger.IsKind(err, outrigger.Invalid) || strings.Contains(err.Error(), "hunter2") {
		t.Fatalf("got %v", err)
	}
}

func TestLocalPeer(t *testing.T) {
	cases := []struct {
		addr net.Addr
		want bool
	}{
		{nil, false},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, true},
		{&net.TCPAddr{IP: net.IPv4(127, 8, 0, 1), Port: 9}, true},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 9}, true},
		{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 9}, false},
		{&net.TCPAddr{IP: net.ParseIP("::ffff:127.0.0.1"), Port: 9}, true},
		{&net.TCPAddr{}, false}, // unspecified is not loopback
		{&net.UnixAddr{Name: "/run/x.sock", Net: "unix"}, true},
	}
	for _, c := range cases {
		if got := LocalPeer(c.addr); got != c.want {
			t.Errorf("LocalPeer(%v) = %v, want %v", c.addr, got, c.want)
		}
	}
	for s, want := range map[string]bool{"@": true, "": false, "127.0.0.1:1": true, "[::1]:1": true, "192.0.2.1:1": false, "localhost:1": false} {
		if got := LocalHostPort(s); got != want {
			t.Errorf("LocalHostPort(%q) = %v, want %v", s, got, want)
		}
	}
}

func TestCheckHost(t *testing.T) {
	allowed := []string{"mesh.example.com"}
	for host, want := range map[string]bool{
		"localhost": true, "localhost:7000": true, "LOCALHOST.:7000": true,
		"127.0.0.1:7000": true, "[::1]:7000": true, "::1": true, "127.9.9.9": true,
		"mesh.example.com": true, "Mesh.Example.Com:443": true, "mesh.example.com.": true,
		"": false, "evil.example": false, "localhost.evil.example": false, "10.0.0.1:7000": false,
		"127.0.0.1.evil.example": false, "mesh.example.com.evil.example": false,
	} {
		err := CheckHost(host, allowed)
		if (err == nil) != want || err != nil && !outrigger.IsKind(err, outrigger.Denied) {
			t.Errorf("CheckHost(%q) = %v, want allowed=%v", host, err, want)
		}
	}
	if CheckHost("", []string{""}) == nil {
		t.Error("an empty allowed name must not allow an empty host")
	}
}
