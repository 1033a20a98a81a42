# Verifies DKIM signatures with Perl's Mail::DKIM, which shares no code with us or with dkimpy. No network.
#
#   perl verify_dkim.pl RECORDS.json MESSAGE...
#
# RECORDS.json: {"selector._domainkey.domain": "v=DKIM1; ..."}; a MESSAGE is a file as it went over the wire (CRLF).
# Prints one line of JSON a message: [[algorithm, domain, selector, result, detail], ...], a row a signature, in order.
#
# Debian 12's Mail::DKIM (1.20230212) knows RSA only. Ed25519 (RFC 8463) is added here as later versions have it: their
# canonical form and body hash, the curve from libtomcrypt (Debian's libcryptx-perl). The test holds it to the RFC's
# own message.
use strict;
use warnings;
use JSON::PP qw(decode_json encode_json);
use Mail::DKIM::Verifier;
use Net::DNS::Packet;
use Net::DNS::RR;

package Records {    # what Mail::DKIM takes for a resolver; a name that is not in the file does not exist
    sub new { my ( $class, $records ) = @_; return bless { records => $records }, $class }
    sub errorstring { return 'NOERROR' }

    sub send {
        my ( $self, $name, $type ) = @_;
        my $packet = Net::DNS::Packet->new( $name, $type );
        my $text = $self->{records}{ lc $name };
        if ( defined $text && $type eq 'TXT' ) {
            my @strings = unpack '(a255)*', $text;    # as DNS carries it: a long key is several strings
            $packet->push( answer => Net::DNS::RR->new( name => $name, type => 'TXT', txtdata => \@strings ) );
        }
        else {
            $packet->header->rcode('NXDOMAIN');
        }
        return $packet;
    }
}

package Ed25519 {
    use parent 'Mail::DKIM::Algorithm::rsa_sha256';    # for its two SHA-256 digests
    use Crypt::PK::Ed25519;
    use MIME::Base64 qw(decode_base64);

    sub verify {
        my ($self) = @_;
        my $digest = $self->{header_digest}->digest;    # RFC 8463 3: what PureEdDSA signs is the hash
        my $signature = decode_base64( $self->signature->data );
        return unless length $signature == 64;
        return unless $self->signature->get_public_key->cork->{curve}->verify_message( $signature, $digest );
        return $self->check_body_hash;
    }
}

package CurveKey {    # stands where Mail::DKIM expects OpenSSL's RSA key
    sub size { return 32 }
}

if ( !Mail::DKIM::Signature->get_algorithm_class('ed25519-sha256') ) {
    no warnings 'redefine';
    my $class_of = \&Mail::DKIM::Signature::get_algorithm_class;
    *Mail::DKIM::Signature::get_algorithm_class = sub {
        my ( $self, $algorithm ) = @_;
        return $algorithm eq 'ed25519-sha256' ? 'Ed25519' : $class_of->( $self, $algorithm );
    };
    my $check = \&Mail::DKIM::PublicKey::check;
    *Mail::DKIM::PublicKey::check = sub {
        my ($self) = @_;
        return $check->($self) unless ( $self->get_tag('k') // 'rsa' ) eq 'ed25519';
        my $raw = MIME::Base64::decode_base64( $self->data // '' );
        die "invalid data\n" unless length $raw == 32;
        my $curve = Crypt::PK::Ed25519->new->import_key_raw( $raw, 'public' );
        $self->cork( bless { curve => $curve }, 'CurveKey' );
        return 1;
    };
}

sub slurp {
    my ($path) = @_;
    open my $file, '<:raw', $path or die "$path: $!\n";
    local $/;
    return scalar <$file>;
}

my ( $records, @messages ) = @ARGV;
die "usage: perl verify_dkim.pl RECORDS.json MESSAGE...\n" unless @messages;
Mail::DKIM::DNS::resolver( Records->new( decode_json( slurp($records) ) ) );
for my $path (@messages) {
    my $verifier = Mail::DKIM::Verifier->new;
    $verifier->PRINT( slurp($path) );
    $verifier->CLOSE;
    my @rows = map { [ $_->algorithm, $_->domain, $_->selector, $_->result, $_->result_detail ] } $verifier->signatures;
    print encode_json( \@rows ), "\n";
}
