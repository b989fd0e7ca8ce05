package shape

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

func readEvents(r io.Reader) (raws, names, datas []string, err error) {
	e := NewEventReader(r, make([]byte, 0, 16)) // small: growth and compaction are exercised
	for {
		ev, err := e.Next()
		if err != nil {
			return raws, names, datas, err
		}
		raws = append(raws, string(ev.Raw))
		if ev.HasData {
			names, datas = append(names, string(ev.Name)), append(datas, string(ev.Data))
		}
	}
}

func TestEventReader(t *testing.T) {
	tests := []struct {
		name, in     string
		names, datas []string
	}{
		{"LF", "data: a\n\ndata: b\n\n", []string{"", ""}, []string{"a", "b"}},
		{"CRLF", "data: a\r\n\r\ndata: b\r\n\r\n", []string{"", ""}, []string{"a", "b"}},
		{"CR", "data: a\r\rdata: b\r\r", []string{"", ""}, []string{"a", "b"}},
		{"mixed", "data: a\r\n\ndata: b\n\r\n", []string{"", ""}, []string{"a", "b"}},
		{"named", "event: response.created\ndata: {}\n\n", []string{"response.created"}, []string{"{}"}},
		{"no space", "data:a\n\n", []string{""}, []string{"a"}},
		{"only one space goes", "data:  a\n\n", []string{""}, []string{" a"}},
		{"several lines", "data: a\ndata: b\ndata\n\n", []string{""}, []string{"a\nb\n"}},
		{"comment", ": ping\n\ndata: a\n\n", []string{""}, []string{"a"}},
		{"id and retry are not data", "id: 7\nretry: 10\n\n", nil, nil},
		{"byte order mark", "\xef\xbb\xbfdata: a\n\n", []string{""}, []string{"a"}},
		{"blank lines between", "\n\n\ndata: a\n\n\n", []string{""}, []string{"a"}},
		{"last without blank line", "data: a\n\ndata: [DONE]\n", []string{"", ""}, []string{"a", "[DONE]"}},
		{"empty", "", nil, nil},
	}
	readers := map[string]func(io.Reader) io.Reader{
		"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader, "halves": iotest.HalfReader, "eof with data": iotest.DataErrReader,
	}
	for _, tt := range tests {
		for how, wrap := range readers {
			raws, names, datas, err := readEvents(wrap(strings.NewReader(tt.in)))
			if err != io.EOF {
				t.Errorf("%s, %s: error %v", tt.name, how, err)
			}
			if strings.Join(raws, "") != tt.in {
				t.Errorf("%s, %s: relayed %q, want %q", tt.name, how, raws, tt.in)
			}
			if strings.Join(datas, "|") != strings.Join(tt.datas, "|") || strings.Join(names, "|") != strings.Join(tt.names, "|") {
				t.Errorf("%s, %s: events %q %q, want %q %q", tt.name, how, names, datas, tt.names, tt.datas)
			}
		}
	}
}

// A cut event is dropped with the error; whole ones before it come out first.
func TestEventReaderLoss(t *testing.T) {
	cut := errors.New("cut")
	in := io.MultiReader(strings.NewReader("data: a\n\ndata: {\"half"), iotest.ErrReader(cut))
	raws, _, _, err := readEvents(in)
	if len(raws) != 1 || raws[0] != "data: a\n\n" || err != cut {
		t.Errorf("got %q, %v", raws, err)
	}
}

func TestEventReaderBound(t *testing.T) {
	_, _, _, err := readEvents(io.MultiReader(strings.NewReader("data: "), zeroes{}))
	if err == nil || !strings.Contains(err.Error(), "exceeds") {
		t.Errorf("endless event: %v", err)
	}
}

type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = '0'
	}
	return len(b), nil
}

// FuzzEventReader: the raw parts are the stream, however it is cut into reads, and the
// events do not depend on the cuts.
func FuzzEventReader(f *testing.F) {
	for _, s := range []string{"data: a\n\n", "data: a\r\n\r\n:c\r\rdata:b\n\r\n", "event: e\ndata: 1\ndata: 2\n\n", "\r\r\n\n", "data: x",
		// The buffer ends between CR and LF.
		"00000000000000\n\r\n", "00000000000000\n\r\n0", "00000000000000\n\r\n\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		raws, names, datas, err := readEvents(bytes.NewReader(in))
		if err != io.EOF {
			t.Fatal(err)
		}
		if strings.Join(raws, "") != string(in) {
			t.Fatalf("relayed %q of %q", raws, in)
		}
		raws2, names2, datas2, err := readEvents(iotest.OneByteReader(bytes.NewReader(in)))
		if err != io.EOF || strings.Join(raws2, "") != string(in) {
			t.Fatalf("bytewise: %q, %v", raws2, err)
		}
		if strings.Join(datas, "\x00") != strings.Join(datas2, "\x00") || strings.Join(names, "\x00") != strings.Join(names2, "\x00") {
			t.Fatalf("events depend on read sizes: %q %q and %q %q", names, datas, names2, datas2)
		}
		// Cut by EventEnd, with what is left at the end, they are the same, but for the LF of a
		// CRLF that came with another read, which is at the start of the next and says nothing.
		var whole []string
		for rest := in; len(rest) > 0; {
			n := EventEnd(rest)
			if n == 0 {
				n = len(rest)
			}
			whole, rest = append(whole, string(rest[:n])), rest[n:]
		}
		var joined []string
		for i, raw := range raws {
			if rest, late := strings.CutPrefix(raw, "\n"); late && i > 0 && strings.HasSuffix(raws[i-1], "\r") {
				joined[len(joined)-1] += "\n"
				raw = rest
			}
			if raw != "" {
				joined = append(joined, raw)
			}
		}
		if !slices.Equal(whole, joined) {
			t.Fatalf("EventEnd cuts %q, the reader %q", whole, raws)
		}
		for _, d := range datas {
			for f := OpenAI; f <= Ollama; f++ { // must not panic
				a := &API{Family: f}
				a.Classify(Event{Data: []byte(d), HasData: true})
				a.Committed(Event{Data: []byte(d), HasData: true})
				f.Usage([]byte(d), &Usage{})
			}
		}
	})
}

func TestClassify(t *testing.T) {
	tests := []struct {
		name, event string
		want        Kind
	}{
		{"comment", ": keep-alive\n\n", Comment},
		{"role only", `data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}`, Preamble},
		{"role, null content", `data: {"choices":[{"delta":{"role":"assistant","content":null}}]}`, Preamble},
		{"prompt filter results", `data: {"choices":[],"prompt_filter_results":[{}]}`, Preamble},
		{"content", `data: {"choices":[{"delta":{"content":"Hi"}}]}`, Content},
		{"tool call", `data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}`, Content},
		{"reasoning", `data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}`, Content},
		{"completion text", `data: {"choices":[{"text":"Hi"}]}`, Content},
		{"finish", `data: {"choices":[{"delta":{},"finish_reason":"stop"}]}`, Content},
		{"usage chunk", `data: {"choices":[],"usage":{"prompt_tokens":1}}`, Content},
		{"done", "data: [DONE]", Done},
		{"error", `data: {"error":{"message":"boom","type":"server_error"}}`, Failure},
		{"error text", `data: {"error":"overloaded"}`, Failure},
		{"error null is none", `data: {"error":null,"choices":[{"delta":{"content":"x"}}]}`, Content},
		{"request at fault", `data: {"error":{"message":"too long","type":"invalid_request_error"}}`, Refused},
		{"request at fault by code", `data: {"error":{"message":"too long","code":400}}`, Refused},
		{"rate limit by code", `data: {"error":{"message":"busy","code":429}}`, Failure},
		{"named error", "event: error\ndata: oops", Failure},
		{"response error", "event: error\n" + `data: {"type":"error","code":"server_error","message":"x"}`, Failure},
		{"response failed", `data: {"type":"response.failed","response":{"error":{"code":"server_error"}}}`, Failure},
		{"response created", `data: {"type":"response.created","response":{"error":null}}`, Preamble},
		{"response delta", `data: {"type":"response.output_text.delta","delta":"x"}`, Content},
		{"not JSON", "data: hello", Content},
		{"other JSON", `data: {"token":{"text":"a"}}`, Content},
	}
	for _, tt := range tests {
		ev := ParseEvent([]byte(tt.event))
		if got := classify(ev); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
		// After the commit point preamble no longer matters; the rest must agree.
		want := tt.want
		if want == Preamble {
			want = Content
		}
		if got := committed(ev); got != want && !(tt.want == Preamble && got == Preamble) {
			t.Errorf("%s, committed: %d, want %d", tt.name, got, want)
		}
	}
}
