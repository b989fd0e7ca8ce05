package wire

import (
	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Seen returns the positions that whoever gets an authority's answer has seen: those of
// the writes behind it. Answers that show no variable and change none have none; dots
// nobody has written are left to identity.Token.With, which passes over them.
func Seen(answer any) (out []outrigger.Dot) {
	add := func(v *pb.Version) { out = append(out, Dot(v.GetDot())) }
	switch r := answer.(type) {
	case *pb.Variable:
		add(r.GetVersion())
	case *pb.DeleteResponse:
		add(r.GetVersion())
	case *pb.DeleteSessionResponse:
		out = append(out, Dot(r.GetGone()))
	case *pb.BatchGetResponse:
		for _, v := range r.GetVariables() {
			add(v.GetVersion())
		}
	case *pb.BatchSetResponse:
		for _, v := range r.GetVariables() {
			add(v.GetVersion())
		}
	case *pb.ListResponse:
		for _, v := range r.GetVariables() {
			add(v.GetVersion())
		}
	}
	return out
}
