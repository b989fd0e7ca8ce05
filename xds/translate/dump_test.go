package translate_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// A dump of everything any kind of client gets holds no secret, and says where one was.
func TestDumpsHoldNoSecrets(t *testing.T) {
	const salt, key = "sAlT-1f9c", "open-sesame-77"
	p := &policy.Policy{Position: 1, Models: []policy.Model{{
		Name: "chat", Salt: salt, Unit: experiments.UnitUser, MaxAttempts: 1,
		Access:   []policy.Access{{Header: "x-team-key", Value: key}},
		Arms:     []policy.Arm{{Name: "a", Version: "v1", Ranges: []experiments.Range{{End: experiments.Buckets}}}},
		Versions: []policy.Version{{Name: "v1", Endpoints: []policy.Endpoint{{Address: "10.0.0.1:80", Region: "eu", Weight: 1}}}},
	}}}
	blanked := 0
	for _, kind := range translate.Kinds() {
		res, err := translate.EncodeFor(kind, p, translate.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, typeURL := range xds.Pushed() {
			for _, name := range res.Names(typeURL) {
				m := res.Get(typeURL, name)
				before := proto.Clone(m)
				raw, err := translate.Dump(m)
				if err != nil || !json.Valid(raw) {
					t.Fatalf("%s %s: %v\n%s", typeURL, name, err, raw)
				}
				again, err := translate.Dump(m)
				if err != nil || !bytes.Equal(raw, again) {
					t.Errorf("%s %s: two dumps differ (%v)", typeURL, name, err)
				}
				if !proto.Equal(m, before) {
					t.Errorf("%s %s was modified", typeURL, name)
				}
				for _, secret := range []string{salt, key} {
					if strings.Contains(string(raw), secret) {
						t.Errorf("%s dump of %s %s holds %q:\n%s", kind, typeURL, name, secret, raw)
					}
				}
				blanked += strings.Count(string(raw), translate.Redacted)
			}
		}
	}
	// Salt in a sidecar's ModelPolicy and an Envoy's script; key for both.
	if blanked != 4 {
		t.Errorf("%d secrets were redacted, want 4", blanked)
	}
}

// Envoy's own annotations are honoured, inside packed messages too.
func TestDumpHonoursSensitiveFields(t *testing.T) {
	secret := &tls.Secret{Name: "server", Type: &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{
		CertificateChain: inline("public"), PrivateKey: inline("very-private"),
	}}}
	packed, err := anypb.New(secret)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := translate.Dump(&core.TypedExtensionConfig{Name: "x", TypedConfig: packed})
	if err != nil || strings.Contains(string(raw), "very-private") || !strings.Contains(string(raw), "public") {
		t.Fatalf("%v\n%s", err, raw)
	}
}

func inline(s string) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: s}}
}
