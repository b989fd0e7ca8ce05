package rest

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
)

// bindMessage fills the request message from the query string or from the body.
func bindMessage(r *http.Request, m proto.Message) error {
	if reads(r) {
		q, err := query(r)
		if err != nil {
			return err
		}
		return bindQuery(q, m)
	}
	var known []string
	if m.ProtoReflect().Descriptor().Fields().ByName("tenant") != nil {
		known = []string{"tenant"} // bound by tenant, which compares it with the header
	}
	if _, err := onlyQuery(r, known...); err != nil {
		return err
	}
	return readProto(r, m)
}

// reads reports whether the call has no body. A HEAD is a GET whose answer is not sent.
func reads(r *http.Request) bool { return r.Method == http.MethodGet || r.Method == http.MethodHead }

// bindQuery sets the scalar and time fields that the query names.
func bindQuery(query map[string]string, m proto.Message) error {
	fields := m.ProtoReflect().Descriptor().Fields()
	for _, name := range slices.Sorted(maps.Keys(query)) {
		fd := fields.ByName(protoreflect.Name(name))
		if fd == nil {
			return invalid("query parameter %q is unknown", name)
		}
		v, err := queryValue(fd, query[name])
		if err != nil {
			return invalid("query parameter %s=%q: %s", name, query[name], protoText(err))
		}
		m.ProtoReflect().Set(fd, v)
	}
	return nil
}

func queryValue(fd protoreflect.FieldDescriptor, s string) (protoreflect.Value, error) {
	switch {
	case fd.IsList() || fd.IsMap():
	case fd.Kind() == protoreflect.StringKind:
		return protoreflect.ValueOfString(s), nil
	case fd.Kind() == protoreflect.BoolKind:
		b, err := strconv.ParseBool(s)
		return protoreflect.ValueOfBool(b), err
	case fd.Kind() == protoreflect.Int32Kind:
		n, err := strconv.ParseInt(s, 10, 32)
		return protoreflect.ValueOfInt32(int32(n)), err
	case fd.Kind() == protoreflect.Uint64Kind:
		n, err := strconv.ParseUint(s, 10, 64)
		return protoreflect.ValueOfUint64(n), err
	case fd.Message() != nil && fd.Message().FullName() == "google.protobuf.Timestamp":
		t, err := time.Parse(time.RFC3339Nano, s)
		ts := timestamppb.New(t)
		return protoreflect.ValueOfMessage(ts.ProtoReflect()), cmp.Or(err, ts.CheckValid())
	}
	return protoreflect.Value{}, errors.New("this field cannot be given in a query")
}

// path binds a path parameter to a field of the request.
func path[T any](param, field string, at func(*T) *string) binder[T] {
	return func(r *http.Request, req *T) error {
		v, dst := r.PathValue(param), at(req)
		if *dst != "" && *dst != v {
			return invalid("%s is %q in the request and %q in the path; leave it out of the request", field, *dst, v)
		}
		*dst = v
		return nil
	}
}

// bindActor records who asks, if the message has a place for it and does not say so.
func bindActor(r *http.Request, m proto.Message) {
	actor := r.Header.Get(headerActor)
	fd := m.ProtoReflect().Descriptor().Fields().ByName("actor")
	if actor == "" || fd == nil || reads(r) || m.ProtoReflect().Has(fd) {
		return
	}
	m.ProtoReflect().Set(fd, protoreflect.ValueOfString(actor))
}

// query returns the query parameters, each of which may be given once. url.URL.Query
// would drop what it cannot read.
func query(r *http.Request) (map[string]string, error) {
	if r.URL.RawQuery == "" {
		return nil, nil // almost every call
	}
	all, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, invalid("query string: %v", err)
	}
	out := make(map[string]string, len(all))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		switch values := all[name]; {
		case len(values) != 1:
			return nil, invalid("query parameter %q is given %d times; give it once", name, len(values))
		case !utf8.ValidString(name) || !utf8.ValidString(values[0]):
			return nil, invalid("query parameter %q is not valid UTF-8", name)
		default:
			out[name] = values[0]
		}
	}
	return out, nil
}

// onlyQuery is query for routes that know a few parameters by name.
func onlyQuery(r *http.Request, known ...string) (map[string]string, error) {
	all, err := query(r)
	if len(all) == 0 {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains(known, name) {
			return nil, invalid("query parameter %q is unknown; this call takes: %s", name, strings.Join(append(known, "nothing else"), ", "))
		}
	}
	return all, nil
}

// readBody returns the body; a body that is not declared as JSON is refused, because a
// web page may send any other type to this server without asking first.
func readBody(r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, &outrigger.Error{Kind: outrigger.Exhausted, Cause: tooLarge,
			Message: fmt.Sprintf("body is larger than the limit of %d bytes; send it in parts", tooLarge.Limit)}
	case err != nil:
		return nil, invalid("body cannot be read: %v", err)
	case len(b) == 0:
		return nil, nil
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("content-type")); err != nil || t != "application/json" {
		return nil, invalid("content-type is %q; send application/json", r.Header.Get("content-type"))
	}
	return b, nil
}

func readProto(r *http.Request, m proto.Message) error {
	b, err := readBody(r)
	if err != nil || len(b) == 0 {
		return err
	}
	if err := protojson.Unmarshal(b, m); err != nil {
		return invalid("body: %s", protoText(err))
	}
	return nil
}

// protoText is the text of a protobuf library's error. The library varies its spacing so
// that nobody compares texts; equal errors of ours have equal texts.
func protoText(err error) string {
	return strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\u00a0", " "), "proto: ")
}

// readJSON is readProto for bodies that are no message; into points to a struct. Unlike
// encoding/json by itself it is as strict as readProto.
func readJSON(r *http.Request, into any) error {
	b, err := readBody(r)
	if err != nil || len(b) == 0 {
		return err
	}
	if !utf8.Valid(b) {
		return invalid("body is not valid UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return invalid("body: %v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return invalid("body holds more than one JSON document")
	}
	if key, ok := repeatedKey(b); ok {
		return invalid("body has the field %q twice", key)
	}
	return nil
}

// repeatedKey finds a field that a decoded object repeats, in whatever case: decoding into
// a struct lets the last one win. Only known fields are left, so seen stays short.
func repeatedKey(b []byte) (string, bool) {
	dec := json.NewDecoder(bytes.NewReader(b))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return "", false
	}
	var seen []string
	for dec.More() {
		tok, err := dec.Token()
		key, ok := tok.(string)
		if err != nil || !ok {
			return "", false
		}
		if slices.ContainsFunc(seen, func(s string) bool { return strings.EqualFold(s, key) }) {
			return key, true
		}
		seen = append(seen, key)
		var value json.RawMessage
		if dec.Decode(&value) != nil {
			return "", false
		}
	}
	return "", false
}

func invalid(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Invalid, format, args...)
}
