package relay_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/identity/identitytest"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Secrets pass through a relay, in the push that names them and in one of their own. The
// network of the test is none that private keys are sent over, so the relay is given none,
// and has none to pass on.
func TestSecretsPassThroughTheRelay(t *testing.T) {
	bubble(t, func(w *world) {
		first, second := identitytest.NewCA("first"), identitytest.NewCA("second")
		client := first.Issue("pod.example")
		publish := func(position uint64, bundle []byte) {
			m := model("a", 100, 0)
			for i := range m.Versions {
				m.Versions[i].TLS = &policy.TLS{ServerName: "api.example", CA: "corp", ClientCert: "pod"}
			}
			key := translate.CertificateSecret("pod", client.Chain, client.Key)
			ca := translate.BundleSecret("corp", bundle)
			res, err := translate.Encode(&policy.Policy{Position: position, Models: []policy.Model{m}},
				translate.Options{Secrets: translate.Secrets{"certificate/pod": key, "ca/corp": ca}})
			if err != nil {
				t.Fatal(err)
			}
			w.publishSet(position, res)
		}
		publish(7, first.PEM)
		p := w.pod("pod-1")
		time.Sleep(time.Second)
		held := p.Material()
		if p.position() != 7 || held.Bundles["corp"] == nil || len(held.Pairs) != 0 {
			t.Fatalf("position %d, %d trust bundles, %d private keys", p.position(), len(held.Bundles), len(held.Pairs))
		}
		was := held.Bundles["corp"].Digest
		publish(8, second.PEM)
		time.Sleep(time.Second)
		if now := p.Material().Bundles["corp"]; now == nil || now.Digest == was || p.position() != 8 {
			t.Fatalf("position %d, bundle %v after its rotation", p.position(), now)
		}
		synctest.Wait()
		late := w.pod("pod-2")
		time.Sleep(time.Second)
		if late.Material().Bundles["corp"] == nil {
			t.Fatal("a pod that joined has no trust bundle")
		}
		w.wantAcked(8, []string{"pod-1", "pod-2"}, nil)
	})
}
