//go:build !unix

package upstream

// quiet trusts the connection where sockets cannot be looked into; a loss is then noticed
// by the request that meets it.
func (l *link) quiet(uintptr) bool { l.ok = true; return true }
