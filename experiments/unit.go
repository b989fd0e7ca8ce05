package experiments

// UnitOf picks what is randomised: the first present of user, session and request id,
// up to and including the one the rule names. An empty string counts as absent.
//
// With nothing present it returns "", false: the request is not enrolled and goes to
// the default arm. It is never assigned at random, because a unit that cannot be
// recognised again would see both arms and count in both. The request id is used only
// under the rule UnitRequest. An unknown rule enrols nobody. No allocation.
func UnitOf(rule Unit, user, session, request string) (unit string, ok bool) {
	switch rule {
	case UnitUser:
		session, request = "", ""
	case UnitSession:
		request = ""
	case UnitRequest:
	default:
		return "", false
	}
	for _, u := range [...]string{user, session, request} {
		if u != "" {
			return u, true
		}
	}
	return "", false
}
