package otlp

import (
	"compress/gzip"
	"errors"
	"io"
	"mime"
	"net/http"

	colmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Media types of OTLP/HTTP.
const (
	typeProtobuf = "application/x-protobuf"
	typeJSON     = "application/json"
)

// ServeHTTP implements OTLP/HTTP: the answer has the request's media type, errors are
// google.rpc.Status.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	kind, _, err := mime.ParseMediaType(req.Header.Get("content-type"))
	if err != nil || kind != typeProtobuf && kind != typeJSON {
		answer(w, typeJSON, http.StatusUnsupportedMediaType, outrigger.Errorf(outrigger.Invalid, "content-type is %q; give %s or %s", req.Header.Get("content-type"), typeProtobuf, typeJSON))
		return
	}
	in := new(colmetrics.ExportMetricsServiceRequest)
	if code, err := read(req, kind, in); err != nil {
		answer(w, kind, code, err)
		return
	}
	out, err := r.export(in)
	if err != nil {
		if outrigger.IsKind(err, outrigger.Unavailable) {
			w.Header().Set("retry-after", "1")
		}
		answer(w, kind, status.HTTP(outrigger.KindOf(err)), err)
		return
	}
	write(w, kind, http.StatusOK, out)
}

// read decodes the body; code is the status of the error.
func read(req *http.Request, kind string, into proto.Message) (code int, err error) {
	body := io.Reader(req.Body)
	switch e := req.Header.Get("content-encoding"); e {
	case "", "identity":
	case "gzip":
		z, err := gzip.NewReader(io.LimitReader(req.Body, MaxBytes))
		if err != nil {
			return http.StatusBadRequest, outrigger.Errorf(outrigger.Invalid, "the body is not gzip: %v", err)
		}
		body = z
	default:
		return http.StatusUnsupportedMediaType, outrigger.Errorf(outrigger.Invalid, "content-encoding is %q; give gzip or none", e)
	}
	raw, err := io.ReadAll(io.LimitReader(body, MaxBytes+1))
	switch {
	case len(raw) > MaxBytes:
		return http.StatusRequestEntityTooLarge, outrigger.Errorf(outrigger.Exhausted, "the body has more than %d bytes", MaxBytes)
	case err != nil && !errors.Is(err, io.EOF):
		return http.StatusBadRequest, outrigger.Errorf(outrigger.Invalid, "the body cannot be read: %v", err)
	}
	if kind == typeJSON {
		err = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(raw, into)
	} else {
		err = proto.Unmarshal(raw, into)
	}
	if err != nil {
		return http.StatusBadRequest, outrigger.Errorf(outrigger.Invalid, "the body is no ExportMetricsServiceRequest: %v", err)
	}
	return 0, nil
}

func answer(w http.ResponseWriter, kind string, code int, err error) {
	s := gstatus.Convert(status.ToGRPC(err)).Proto()
	write(w, kind, code, &spb.Status{Code: s.GetCode(), Message: s.GetMessage()})
}

func write(w http.ResponseWriter, kind string, code int, m proto.Message) {
	var raw []byte
	var err error
	if kind == typeJSON {
		raw, err = protojson.Marshal(m)
	} else {
		raw, err = proto.Marshal(m)
	}
	if err != nil {
		code, raw = http.StatusInternalServerError, nil
	}
	w.Header().Set("content-type", kind)
	w.WriteHeader(code)
	_, _ = w.Write(raw) // a caller that left cannot be told
}
