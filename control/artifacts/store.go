// Package artifacts keeps the files that model versions are made of, content-addressed in
// a blob store: a directory, or a bucket of a service that speaks S3.
//
//	s, err := artifacts.Open(ctx, "file:///var/lib/outrigger/artifacts", artifacts.Options{})
//	a, err := s.Put(ctx, "sha256:9f86…", body)   // all or nothing
//	a, r, err := s.Get(ctx, "sha256:9f86…")      // verified to its last byte
//	mux.Handle("/v1/artifacts/", s.Handler(gate))
//
// # Promises
//
//   - An artifact's name is the SHA-256 of its bytes, "sha256:" and 64 lower-case hex
//     digits, as deploy/models writes it into versions. It never means other bytes.
//   - Put stores exactly the bytes that have the digest asked for, or nothing: the object
//     appears under its name when all of them are durable in the store and have been
//     checked. Bytes with another digest, a body that breaks off, a store that fails and a
//     process that dies leave no object of that name (a directory may keep a temporary file
//     of a process that was killed; it is never read). Storing one again is no error, and
//     replaces a copy that went bad.
//   - Get's reader gives the last bytes only after all of them were checked: a copy that
//     went bad ends in an error of kind Unavailable, naming both digests, and never in io.EOF.
//   - Memory is one buffer of HoldBack bytes per transfer for directories, and what the
//     upload of parts needs (about 25 MiB) for S3, whatever the size of the artifact.
//
// # Limits
//
// MaxBytes per artifact, MaxTransfers at once; more are refused with kind Exhausted. A body
// that moves nothing for StallTime is broken off. Nothing is ever deleted here: versions
// are immutable and name artifacts for ever; who needs the room removes objects in the
// store, and versions that name them answer NotFound.
//
// # Errors
//
// Invalid for a digest that is malformed or not that of the bytes, naming both; NotFound;
// Exhausted; Unavailable when the store cannot be reached or its copy went bad.
//
// A Store may be used by any number of goroutines; Open starts none, Close ends it.
package artifacts

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"gocloud.dev/blob"
	_ "gocloud.dev/blob/fileblob" // file:// URLs
	_ "gocloud.dev/blob/s3blob"   // s3:// URLs
	"gocloud.dev/gcerrors"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/deploy/models"
)

// Defaults of Options.
const (
	DefaultMaxBytes     = 64 << 30
	DefaultMaxTransfers = 16
	DefaultStallTime    = 30 * time.Second
)

// HoldBack is how many bytes a reader keeps until everything is verified.
const HoldBack = 256 << 10

// MaxListed bounds one list.
const MaxListed = 1000

const (
	prefix       = "sha256/"
	digestPrefix = "sha256:"
)

// Options of a Store; zero values are the defaults.
type Options struct {
	// MaxBytes bounds one artifact, MaxTransfers the uploads and downloads at one time.
	MaxBytes     int64
	MaxTransfers int
	// StallTime is how long an HTTP transfer may move nothing.
	StallTime time.Duration
	Logger    *slog.Logger // nil = discard
}

// Artifact is one stored file.
type Artifact struct {
	Digest   string    `json:"digest"`
	Bytes    int64     `json:"bytes"`
	StoredAt time.Time `json:"stored_at"`
}

// Store is a blob store of artifacts.
type Store struct {
	bucket *blob.Bucket
	o      Options
	slots  chan struct{} // one per transfer under way
}

// Open connects to the store of a URL: file:///absolute/directory, which is made if it is
// missing and whose temporary files lie beside the objects so that none is half visible,
// or s3://bucket?region=…&prefix=…/, whose credentials and endpoint are those of the AWS
// SDK (environment, shared files, instance roles; query parameter endpoint for others). The
// error has kind Invalid for a URL that no store understands.
func Open(ctx context.Context, rawURL string, o Options) (*Store, error) {
	o.MaxBytes = cmp.Or(o.MaxBytes, DefaultMaxBytes)
	o.MaxTransfers = cmp.Or(o.MaxTransfers, DefaultMaxTransfers)
	o.StallTime = cmp.Or(o.StallTime, DefaultStallTime)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.MaxBytes < 0 || o.MaxTransfers < 0 || o.StallTime < 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "artifacts: MaxBytes %d, MaxTransfers %d and StallTime %v must not be negative", o.MaxBytes, o.MaxTransfers, o.StallTime)
	}
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme != "file" && u.Scheme != "s3" {
		return nil, outrigger.Errorf(outrigger.Invalid, "artifacts url %q is neither file:///DIRECTORY nor s3://BUCKET", rawURL)
	}
	if u.Scheme == "file" {
		q := u.Query()
		// A temporary file elsewhere could not be renamed into place; attribute files would
		// be a second thing to keep in step.
		q.Set("no_tmp_dir", "true")
		q.Set("metadata", "skip")
		q.Set("create_dir", "true")
		q.Set("dir_file_mode", "0750")
		u.RawQuery = q.Encode()
	}
	bucket, err := blob.OpenBucket(ctx, u.String())
	if err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "artifacts url %q cannot be opened: %v", rawURL, err)
	}
	return &Store{bucket: bucket, o: o, slots: make(chan struct{}, o.MaxTransfers)}, nil
}

// Close ends the store; transfers under way fail.
func (s *Store) Close() error { return s.bucket.Close() }

func key(digest string) string {
	hexed := strings.TrimPrefix(digest, digestPrefix)
	return prefix + hexed[:2] + "/" + hexed
}

// enter takes a slot for a transfer, or refuses.
func (s *Store) enter() error {
	select {
	case s.slots <- struct{}{}:
		return nil
	default:
		return outrigger.Errorf(outrigger.Exhausted, "%d artifacts are being moved already, the limit is %d; try again", cap(s.slots), cap(s.slots))
	}
}

func (s *Store) leave() { <-s.slots }

// Put stores the bytes of r, if they have the digest. It reads r to its end or to the first
// error, and keeps nothing unless all is well.
func (s *Store) Put(ctx context.Context, digest string, r io.Reader) (Artifact, error) {
	if err := models.CheckDigest("artifact", digest); err != nil {
		return Artifact{}, err
	}
	if err := s.enter(); err != nil {
		return Artifact{}, err
	}
	defer s.leave()
	// Cancelling before Close is how a writer is told to keep nothing.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var file *os.File // of a directory's store
	w, err := s.bucket.NewWriter(ctx, key(digest), &blob.WriterOptions{ContentType: "application/octet-stream", DisableContentTypeDetection: true,
		BeforeWrite: func(as func(any) bool) error { as(&file); return nil }})
	if err != nil {
		return Artifact{}, storeError(err, digest)
	}
	h := sha256.New()
	n, err := copyTo(io.MultiWriter(h, storeWriter{w}), io.LimitReader(r, s.o.MaxBytes+1))
	switch got := digestPrefix + hex.EncodeToString(h.Sum(nil)); {
	case err != nil:
	case n > s.o.MaxBytes:
		err = outrigger.Errorf(outrigger.Exhausted, "artifact has more than %d bytes, which is the limit", s.o.MaxBytes)
	case got != digest:
		err = outrigger.Errorf(outrigger.Invalid, "artifact: the %d bytes received have digest %s, expected %s; nothing was stored", n, got, digest)
	case file != nil:
		if err = file.Sync(); err != nil {
			err = errStore{err}
		}
	}
	if err != nil {
		cancel()
		_ = w.Close() // it was cancelled: the error says so and nothing else
		return Artifact{}, putError(err, digest)
	}
	if err := w.Close(); err != nil {
		return Artifact{}, storeError(err, digest)
	}
	if file != nil {
		if err := syncDir(filepath.Dir(file.Name())); err != nil {
			return Artifact{}, storeError(err, digest)
		}
	}
	return s.Stat(context.WithoutCancel(ctx), digest)
}

// syncDir makes a rename durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// storeWriter tells errors of the store from those of the body.
type storeWriter struct{ w io.Writer }

type errStore struct{ error }

// Write implements io.Writer.
func (s storeWriter) Write(b []byte) (int, error) {
	n, err := s.w.Write(b)
	if err != nil {
		err = errStore{err}
	}
	return n, err
}

// copyTo is io.Copy by one buffer, whatever r and w could do for each other.
func copyTo(w io.Writer, r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, HoldBack))
}

func putError(err error, digest string) error {
	var own *outrigger.Error
	var store errStore
	switch {
	case errors.As(err, &own):
		return err
	case errors.As(err, &store):
		return storeError(store.error, digest)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return outrigger.Errorf(outrigger.Cancelled, "artifact %s: the upload broke off and nothing was stored: %v", digest, err)
}

// Stat describes a stored artifact without reading it.
func (s *Store) Stat(ctx context.Context, digest string) (Artifact, error) {
	if err := models.CheckDigest("artifact", digest); err != nil {
		return Artifact{}, err
	}
	a, err := s.bucket.Attributes(ctx, key(digest))
	if err != nil {
		return Artifact{}, storeError(err, digest)
	}
	return Artifact{Digest: digest, Bytes: a.Size, StoredAt: a.ModTime.UTC()}, nil
}

// Get opens an artifact. The reader fails, with kind Unavailable and without having given the
// last bytes, if they do not have the digest. Close it.
func (s *Store) Get(ctx context.Context, digest string) (Artifact, io.ReadCloser, error) {
	if err := models.CheckDigest("artifact", digest); err != nil {
		return Artifact{}, nil, err
	}
	if err := s.enter(); err != nil {
		return Artifact{}, nil, err
	}
	r, err := s.bucket.NewReader(ctx, key(digest), nil)
	if err != nil {
		s.leave()
		return Artifact{}, nil, storeError(err, digest)
	}
	a := Artifact{Digest: digest, Bytes: r.Size(), StoredAt: r.ModTime().UTC()}
	return a, &verified{src: r, sum: sha256.New(), digest: digest, left: r.Size(), leave: s.leave}, nil
}

// verified gives bytes on HoldBack behind what it has read and checked.
type verified struct {
	src    io.ReadCloser
	sum    hash.Hash
	digest string
	left   int64 // not read yet, of what the store says there is
	buf    []byte
	at     int // of buf, given on up to here
	err    error
	leave  func()
}

// Read implements io.Reader.
func (v *verified) Read(b []byte) (int, error) {
	for v.at == len(v.buf) {
		if v.err != nil {
			return 0, v.err
		}
		v.fill()
	}
	n := copy(b, v.buf[v.at:])
	v.at += n
	return n, nil
}

// fill reads the next buffer. The last one is given on only if the digest is right.
func (v *verified) fill() {
	if v.buf == nil {
		v.buf = make([]byte, 0, HoldBack)
	}
	v.at = 0
	want := min(v.left, HoldBack)
	v.buf = v.buf[:want]
	n, err := io.ReadFull(v.src, v.buf)
	v.sum.Write(v.buf[:n])
	v.left -= int64(n)
	switch {
	case err != nil && want > 0:
		v.fail("ends %d bytes early (%v)", v.left, err)
	case v.left == 0:
		if got := digestPrefix + hex.EncodeToString(v.sum.Sum(nil)); got != v.digest {
			v.fail("has digest %s", got)
			return
		}
		v.err = io.EOF
	}
}

func (v *verified) fail(format string, args ...any) {
	v.buf = v.buf[:0]
	v.err = outrigger.Errorf(outrigger.Unavailable, "artifact: the stored copy "+format+", expected "+v.digest+"; store it again", args...)
}

// Close implements io.Closer.
func (v *verified) Close() error {
	if v.leave != nil {
		v.leave()
		v.leave = nil
	}
	return v.src.Close()
}

// List returns up to limit artifacts, at most MaxListed, in the order of their digests.
func (s *Store) List(ctx context.Context, limit int) ([]Artifact, error) {
	if limit < 1 || limit > MaxListed {
		return nil, outrigger.Errorf(outrigger.Invalid, "limit is %d, allowed is 1..%d", limit, MaxListed)
	}
	out := []Artifact{}
	for it := s.bucket.List(&blob.ListOptions{Prefix: prefix}); len(out) < limit; {
		o, err := it.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, storeError(err, prefix)
		}
		digest := digestPrefix + o.Key[strings.LastIndexByte(o.Key, '/')+1:]
		if models.CheckDigest("", digest) != nil {
			continue // a temporary file
		}
		out = append(out, Artifact{Digest: digest, Bytes: o.Size, StoredAt: o.ModTime.UTC()})
	}
	return out, nil
}

// storeError gives an error of the store its kind.
func storeError(err error, digest string) error {
	switch {
	case gcerrors.Code(err) == gcerrors.NotFound:
		return outrigger.Errorf(outrigger.NotFound, "artifact %s not found in the store", digest)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return outrigger.Errorf(outrigger.Unavailable, "artifact %s: the store failed: %v", digest, err)
}
