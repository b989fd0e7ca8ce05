package adsclient

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// The last-known-good file:
//
//	8 bytes   magic, whose last byte is the format version
//	8 bytes   length of the payload, big endian
//	32 bytes  SHA-256 of the payload
//	payload   a DeltaDiscoveryResponse with every resource in force and its version
//
// The checksum guards against torn and rotten files, not against an attacker, who could
// write the payload as well: the directory must belong to the sidecar.
const (
	fileName   = "policy.lkg"
	tempSuffix = ".tmp"
	fileMagic  = "ORGRLKG\x01"
	headerSize = len(fileMagic) + 8 + sha256.Size
	maxFile    = 256 << 20
)

// encodeFile writes a view in a deterministic order.
func encodeFile(v *view) ([]byte, error) {
	all := &discovery.DeltaDiscoveryResponse{}
	for _, r := range v.raw {
		all.Resources = append(all.Resources, r)
	}
	slices.SortFunc(all.Resources, func(a, b *discovery.Resource) int {
		return strings.Compare(a.GetResource().GetTypeUrl()+" "+a.GetName(), b.GetResource().GetTypeUrl()+" "+b.GetName())
	})
	payload, err := translate.Marshal(all)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(payload)
	out := binary.BigEndian.AppendUint64([]byte(fileMagic), uint64(len(payload)))
	return append(append(out, sum[:]...), payload...), nil
}

// decodeFile is the inverse of encodeFile for any bytes: it returns a view and the
// policy it stands for, or an Invalid error that says what is wrong.
func decodeFile(raw []byte) (*view, *policy.Policy, error) {
	if len(raw) < headerSize || !bytes.HasPrefix(raw, []byte(fileMagic)) {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "not a last-known-good file of format %d", fileMagic[len(fileMagic)-1])
	}
	payload := raw[headerSize:]
	if n := binary.BigEndian.Uint64(raw[len(fileMagic):]); n != uint64(len(payload)) {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "payload is %d bytes, the header says %d", len(payload), n)
	}
	if sum := sha256.Sum256(payload); !bytes.Equal(sum[:], raw[headerSize-sha256.Size:headerSize]) {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "checksum does not match")
	}
	var all discovery.DeltaDiscoveryResponse
	if err := proto.Unmarshal(payload, &all); err != nil {
		return nil, nil, outrigger.Wrap(outrigger.Invalid, err, "payload")
	}
	v := newView()
	for _, r := range all.GetResources() {
		if _, err := v.put(r.GetResource().GetTypeUrl(), r); err != nil {
			return nil, nil, err
		}
	}
	p, err := translate.Decode(&v.res)
	return v, p, err
}

// load puts the saved policy in force, if there is a usable one.
func (c *Client) load() {
	if c.opt.Dir == "" {
		return
	}
	path := filepath.Join(c.opt.Dir, fileName)
	raw, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var v *view
	var p *policy.Policy
	if err == nil {
		v, p, err = decodeFile(raw)
	}
	if err != nil {
		c.log.Error("last-known-good policy ignored; waiting for the control plane", "file", path, "error", err)
		return
	}
	c.good = v
	c.equip(v)
	c.enforce(p, func(s *Status) { s.Source = SourceDisk })
	c.log.Info("last-known-good policy in force until the control plane answers", "file", path, "position", p.Position)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // read only: nothing to lose
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(raw) > maxFile {
		err = outrigger.Errorf(outrigger.Invalid, "file is larger than %d bytes", maxFile)
	}
	return raw, err
}

// save hands v to the saver, replacing an older one that is still waiting. v must not
// be modified afterwards.
func (c *Client) save(v *view) {
	if c.opt.Dir == "" {
		return
	}
	select {
	case <-c.backlog:
	default:
	}
	c.backlog <- v // room for one, and only this goroutine sends
}

// saveLoop writes what it is handed until backlog is closed; the last one is written too.
func (c *Client) saveLoop() {
	for v := range c.backlog {
		raw, err := encodeFile(v)
		if err == nil {
			err = writeFile(c.opt.Dir, raw)
		}
		if err != nil {
			c.log.Error("last-known-good policy not saved; a restart without control plane would use an older one", "dir", c.opt.Dir, "error", err)
		}
	}
}

// writeFile replaces the file atomically and durably: whatever happens, a reader finds
// the old or the new one whole.
func writeFile(dir string, raw []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(dir, fileName)
	f, err := os.OpenFile(path+tempSuffix, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	// One that an earlier process left behind has the mode it had then.
	if err = f.Chmod(0o600); err == nil {
		_, err = f.Write(raw)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+tempSuffix, path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
