package adsclient

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/policy/policytest"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

func viewOf(t interface{ Fatal(...any) }, p *policy.Policy) *view {
	res, err := translate.Encode(p, translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	v := newView()
	for _, typeURL := range xds.Types() {
		for _, name := range res.Names(typeURL) {
			raw, err := translate.Marshal(res.Get(typeURL, name))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := v.put(typeURL, &discovery.Resource{Name: name, Version: "v-" + name, Resource: &anypb.Any{TypeUrl: typeURL, Value: raw}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	return v
}

// Whatever policy is in force, the file brings it back with its versions, and the same
// policy gives the same file.
func TestFileRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := policytest.Policy().Draw(t, "policy")
		v := viewOf(t, p)
		raw, err := encodeFile(v)
		if err != nil {
			t.Fatal(err)
		}
		back, got, err := decodeFile(raw)
		if err != nil || !policy.Equal(got, p) {
			t.Fatalf("%v: %+v", err, got)
		}
		for _, typeURL := range xds.Types() {
			for name, version := range v.versions(typeURL) {
				if back.versions(typeURL)[name] != version {
					t.Fatalf("version of %s lost", name)
				}
			}
		}
		if again, err := encodeFile(back); err != nil || !bytes.Equal(again, raw) {
			t.Fatalf("not deterministic: %v", err)
		}
	})
}

// The loader on arbitrary bytes, as they are and as a payload under a correct header,
// never panics; what it accepts is a valid policy.
func FuzzDecodeFile(f *testing.F) {
	seed := viewOf(f, rapid.Custom(func(t *rapid.T) *policy.Policy { return policytest.Policy().Draw(t, "p") }).Example(1))
	raw, err := encodeFile(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(raw[headerSize:])
	f.Add([]byte(fileMagic))
	f.Fuzz(func(t *testing.T, raw []byte) {
		sum := sha256.Sum256(raw)
		wrapped := binary.BigEndian.AppendUint64([]byte(fileMagic), uint64(len(raw)))
		wrapped = append(append(wrapped, sum[:]...), raw...)
		for _, b := range [][]byte{raw, wrapped} {
			_, p, err := decodeFile(b)
			if err == nil && p.Validate() != nil {
				t.Fatalf("accepted an invalid policy: %v", p.Validate())
			}
		}
	})
}
